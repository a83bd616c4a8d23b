// Dense rows in place times 1 to 8 tokens (included by avx512.h): W [N, K] row by row as torch keeps it, no packing.
//
// One row after the other, and no software prefetch: the hardware sees a single stream and reads it at 25 to 36 GB/s on one
// Zen 4 core, where 4 to 16 rows at a time reached 9 to 27. Only when the tokens do not fit into half of the first-level
// cache, 2 or 4 rows share each load of x. The lanes of up to 16 sums are added up together, by a transposition.

struct DensePairs {
  I512 __m512 times(__m512 sum, __m512i w, __m512i x) { return _mm512_dpbf16_ps(sum, (__m512bh)w, (__m512bh)x); }
};
struct DenseSingle {
  I512 __m512 times(__m512 sum, __m512i w, __m512i x) {
    return _mm512_fmadd_ps(_mm512_castsi512_ps(w), _mm512_castsi512_ps(x), sum);
  }
};

template <class T, int NB, int R>
F512 static void dense_rows(const uint8_t* weight, int64_t rows, int64_t row_bytes, const uint32_t* x, int64_t dwords, float* out) {
  constexpr int SETS = R * NB == 1 ? 4 : R * NB <= 4 ? 2 : 1, TOGETHER = 16 / NB / R * R;
  const uint8_t* v = (const uint8_t*)x;
  for (int top = 0; top < 16 && top < rows; top += TOGETHER) {
    __m512i lanes[16] = {};
    for (int r = 0; r < TOGETHER && top + r < rows && top + r < 16; r += R) {
      const uint8_t* from[R];
      UNROLL for (int i = 0; i < R; i++) from[i] = weight + (top + r + i < rows ? top + r + i : rows - 1) * row_bytes;
      __m512 sum[SETS][R * NB];
      UNROLL for (int s = 0; s < SETS; s++) UNROLL for (int b = 0; b < R * NB; b++) sum[s][b] = _mm512_setzero_ps();
      int64_t at = 0;
      for (; at + 64 * SETS <= row_bytes; at += 64 * SETS)
        UNROLL for (int s = 0; s < SETS; s++) {
          __m512i w[R];
          UNROLL for (int i = 0; i < R; i++) w[i] = _mm512_loadu_si512(from[i] + at + 64 * s);
          UNROLL for (int b = 0; b < NB; b++) {
            const __m512i t = _mm512_loadu_si512(v + b * dwords * 4 + at + 64 * s);
            UNROLL for (int i = 0; i < R; i++) sum[s][i * NB + b] = T::times(sum[s][i * NB + b], w[i], t);
          }
        }
      for (; at < row_bytes; at += 64)
        UNROLL for (int i = 0; i < R; i++) {
          const __m512i w = _mm512_maskz_loadu_epi8(first(row_bytes - at), from[i] + at);
          UNROLL for (int b = 0; b < NB; b++)
            sum[0][i * NB + b] = T::times(sum[0][i * NB + b], w, _mm512_loadu_si512(v + b * dwords * 4 + at));
        }
      UNROLL for (int b = 0; b < R * NB; b++) {
        UNROLL for (int s = 1; s < SETS; s++) sum[0][b] = _mm512_add_ps(sum[0][b], sum[s][b]);
        lanes[r * NB + b] = _mm512_castps_si512(sum[0][b]);
      }
    }
    transpose(lanes);
    UNROLL for (int width = 8; width; width /= 2)
      UNROLL for (int j = 0; j < width; j++)
        lanes[j] = _mm512_castps_si512(_mm512_add_ps(_mm512_castsi512_ps(lanes[j]), _mm512_castsi512_ps(lanes[j + width])));
    float total[16];
    _mm512_storeu_si512(total, lanes[0]);
    for (int r = 0; r < TOGETHER && top + r < 16; r++)
      for (int b = 0; b < NB; b++) out[b * 16 + top + r] = total[r * NB + b];
  }
}

template <class T, int NB>
F512 static void dense_shared(const uint8_t* w, int64_t rows, int64_t row_bytes, const uint32_t* x, int64_t dwords, float* out) {
  if (dwords * NB <= 5120) dense_rows<T, NB, 1>(w, rows, row_bytes, x, dwords, out);
  else dense_rows<T, NB, (NB <= 2 ? 1 : NB <= 4 ? 4 : 2)>(w, rows, row_bytes, x, dwords, out);
}

// out [tokens, 16] = W[0:rows] x^T; x is [tokens, dwords], zero past `columns`, dwords a multiple of 16; rows <= 16.
template <class T>
F512 static void dense_tokens(const uint8_t* w, int64_t rows, int64_t row_bytes, const uint32_t* x, int64_t dwords, int tokens,
                              float* out) {
  switch (tokens) {
    case 1: return dense_shared<T, 1>(w, rows, row_bytes, x, dwords, out);
    case 2: return dense_shared<T, 2>(w, rows, row_bytes, x, dwords, out);
    case 3: return dense_shared<T, 3>(w, rows, row_bytes, x, dwords, out);
    case 4: return dense_shared<T, 4>(w, rows, row_bytes, x, dwords, out);
    case 5: return dense_shared<T, 5>(w, rows, row_bytes, x, dwords, out);
    case 6: return dense_shared<T, 6>(w, rows, row_bytes, x, dwords, out);
    case 7: return dense_shared<T, 7>(w, rows, row_bytes, x, dwords, out);
    default: return dense_shared<T, 8>(w, rows, row_bytes, x, dwords, out);
  }
}
F512 static void dense(const uint8_t* weight, int type, int64_t rows, int64_t columns, const uint32_t* x, int64_t dwords,
                       int tokens, float* out) {
  if (type == FLOAT32) dense_tokens<DenseSingle>(weight, rows, columns * 4, x, dwords, tokens, out);
  else dense_tokens<DensePairs>(weight, rows, columns * 2, x, dwords, tokens, out);
}
