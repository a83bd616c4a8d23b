// Dense rows in place times 1 to 8 tokens (included by avx2.h): W [N, K] row by row as torch keeps it, 8 columns at a time,
// bfloat16 widened to float32 on the way; 2 or 4 rows share each load of x.

template <bool BF16> I256 __m256 weights(const uint8_t* row, int64_t at, int64_t columns) {
  return floats(row, BF16 ? BFLOAT16 : FLOAT32, at, columns);
}
template <bool BF16, int R, int NB>
F256 static void dense_rows(const uint8_t* weight, int64_t rows, int64_t columns, const uint32_t* x, int64_t dwords, float* out) {
  constexpr int SETS = R * NB <= 4 ? 2 : 1;
  const int64_t row_bytes = columns * (BF16 ? 2 : 4);
  for (int top = 0; top < 16 && top < rows; top += R) {
    const uint8_t* from[R];
    for (int r = 0; r < R; r++) from[r] = weight + (top + r < rows ? top + r : rows - 1) * row_bytes;
    __m256 sum[SETS][R][NB];
    for (int s = 0; s < SETS; s++)
      for (int r = 0; r < R; r++)
        for (int b = 0; b < NB; b++) sum[s][r][b] = _mm256_setzero_ps();
    int64_t k = 0;
    for (; k + 8 * SETS <= columns; k += 8 * SETS)
      UNROLL for (int s = 0; s < SETS; s++)
        UNROLL for (int r = 0; r < R; r++) {
          __m256 w = weights<BF16>(from[r], k + 8 * s, INT64_MAX);
          UNROLL for (int b = 0; b < NB; b++)
            sum[s][r][b] = _mm256_fmadd_ps(w, _mm256_loadu_ps((const float*)x + b * dwords + k + 8 * s), sum[s][r][b]);
        }
    for (; k < columns; k += 8)
      for (int r = 0; r < R; r++)
        for (int b = 0; b < NB; b++)
          sum[0][r][b] = _mm256_fmadd_ps(weights<BF16>(from[r], k, columns), _mm256_loadu_ps((const float*)x + b * dwords + k),
                                         sum[0][r][b]);
    for (int r = 0; r < R && top + r < rows; r++)
      for (int b = 0; b < NB; b++) {
        __m256 v = sum[0][r][b];
        if (SETS == 2) v = _mm256_add_ps(v, sum[SETS - 1][r][b]);
        __m128 h = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
        h = _mm_add_ps(h, _mm_movehl_ps(h, h));
        out[b * 16 + top + r] = _mm_cvtss_f32(_mm_add_ss(h, _mm_movehdup_ps(h)));
      }
  }
}
template <bool BF16>
F256 static void dense_tokens(const uint8_t* w, int64_t rows, int64_t columns, const uint32_t* x, int64_t dwords, int tokens,
                              float* out) {
  for (int at = 0; at < tokens; at += 4, x += 4 * dwords, out += 64) {
    switch (tokens - at) {
      case 1: dense_rows<BF16, 4, 1>(w, rows, columns, x, dwords, out); break;
      case 2: dense_rows<BF16, 4, 2>(w, rows, columns, x, dwords, out); break;
      case 3: dense_rows<BF16, 2, 3>(w, rows, columns, x, dwords, out); break;
      default: dense_rows<BF16, 2, 4>(w, rows, columns, x, dwords, out);
    }
  }
}
F256 static void dense(const uint8_t* weight, int type, int64_t rows, int64_t columns, const uint32_t* x, int64_t dwords,
                       int tokens, float* out) {
  if (type == FLOAT32) dense_tokens<false>(weight, rows, columns, x, dwords, tokens, out);
  else dense_tokens<true>(weight, rows, columns, x, dwords, tokens, out);
}
