// The AVX-512 path (F, BW, DQ, VL, VBMI2, VNNI; BF16 where the machine has it). A block is one register: load 64 bytes of
// stored entries, vpexpand them to the places of the mask, multiply-add with one broadcast dword of x per token, advance by
// the number of bits. No horizontal sums: lane r belongs to row r throughout.
//
// Measured on Zen 4: vpexpand from a register takes 0.47 ns and from memory 0.71 (hence the barrier in `load`); expanding
// 4 blocks before the first multiply-add takes 1.0 ns a block, expanding each just before its use 1.8.
#pragma once
#include "plan.h"

namespace avx512 {
#define F512 __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx512vbmi2,avx512vnni,avx512bf16,avx2,fma,f16c,bmi2,popcnt")))
#define I512 static INLINE F512

constexpr int64_t AHEAD = 4096;  // bytes of prefetch: 0.5 to 4 KB and none at all are within 7% of each other

I512 __m512i load(const uint8_t* from) {
  __m512i v = _mm512_loadu_si512(from);
  asm("" : "+v"(v));
  return v;
}

struct Words {  // float32
  typedef uint16_t Mask;
  static constexpr int BYTES = 4;
  I512 __m512i expand(Mask m, __m512i v) { return _mm512_maskz_expand_epi32(m, v); }
  I512 __m512i compress(Mask m, __m512i v) { return _mm512_maskz_compress_epi32(m, v); }
  I512 Mask nonzero(__m512i v) { return _mm512_test_epi32_mask(v, v); }
  I512 void store(uint8_t* to, int n, __m512i v) { _mm512_mask_storeu_epi32(to, (__mmask16)_bzhi_u32(~0u, n), v); }
};
struct Halves {  // bfloat16, float16
  typedef uint32_t Mask;
  static constexpr int BYTES = 2;
  I512 __m512i expand(Mask m, __m512i v) { return _mm512_maskz_expand_epi16(m, v); }
  I512 __m512i compress(Mask m, __m512i v) { return _mm512_maskz_compress_epi16(m, v); }
  I512 Mask nonzero(__m512i v) { return _mm512_test_epi16_mask(v, v); }
  I512 void store(uint8_t* to, int n, __m512i v) { _mm512_mask_storeu_epi16(to, _bzhi_u32(~0u, n), v); }
};
struct Quarters {  // int8
  typedef uint64_t Mask;
  static constexpr int BYTES = 1;
  I512 __m512i expand(Mask m, __m512i v) { return _mm512_maskz_expand_epi8(m, v); }
  I512 __m512i compress(Mask m, __m512i v) { return _mm512_maskz_compress_epi8(m, v); }
  I512 Mask nonzero(__m512i v) { return _mm512_test_epi8_mask(v, v); }
  I512 void store(uint8_t* to, int n, __m512i v) { _mm512_mask_storeu_epi8(to, _bzhi_u64(~0ull, n), v); }
};

template <class T> I512 __m512i next(const uint8_t* masks, const uint8_t*& values) {
  typename T::Mask mask = read<typename T::Mask>(masks);
  __m512i block = T::expand(mask, load(values));
  values += (sizeof(mask) == 8 ? __builtin_popcountll(mask) : __builtin_popcount((uint32_t)mask)) * T::BYTES;
  return block;
}

// The next 4 blocks. Masks come by the 64 bits and are taken apart in general registers: 7% faster than loading each twice,
// into a mask register and for its number of bits.
template <class T> I512 const uint8_t* four(const uint8_t* masks, const uint8_t* values, __m512i* w) {
  typedef typename T::Mask Mask;
  constexpr int BITS = 8 * sizeof(Mask), EACH = 64 / BITS;
  UNROLL for (int u = 0; u < 4; u += EACH) {
    uint64_t bits = read<uint64_t>(masks + u * sizeof(Mask));
    asm("" : "+r"(bits));
    const uint8_t* end = values + __builtin_popcountll(bits) * T::BYTES;
    UNROLL for (int j = 0; j < EACH; j++) {
      const Mask mask = (Mask)(bits >> (BITS * j % 64));
      w[u + j] = T::expand(mask, load(values));
      values = j == EACH - 1 ? end : values + __builtin_popcountll((uint64_t)mask) * T::BYTES;
    }
  }
  return values;
}

// ---- arithmetic: what one expanded block adds to the sums of NB tokens; x points at the block's DWORDS x NB dwords ----
I512 __m512 one(const uint32_t* x) { return _mm512_castsi512_ps(_mm512_set1_epi32((int)*x)); }

struct Single : Words {
  static constexpr int DWORDS = 1;
  typedef __m512 Sum;
  I512 Sum zero() { return _mm512_setzero_ps(); }
  I512 Sum add(Sum a, Sum b) { return _mm512_add_ps(a, b); }
  template <int NB> I512 void times(Sum* sum, __m512i w, const uint32_t* x) {
    UNROLL for (int b = 0; b < NB; b++) sum[b] = _mm512_fmadd_ps(_mm512_castsi512_ps(w), one(x + b), sum[b]);
  }
};
struct Wide : Halves {
  static constexpr int DWORDS = 2;
  typedef __m512 Sum;
  I512 Sum zero() { return _mm512_setzero_ps(); }
  I512 Sum add(Sum a, Sum b) { return _mm512_add_ps(a, b); }
  template <int NB> I512 void both(Sum* sum, __m512 even, __m512 odd, const uint32_t* x) {
    UNROLL for (int b = 0; b < NB; b++) sum[b] = _mm512_fmadd_ps(even, one(x + b), sum[b]);
    UNROLL for (int b = 0; b < NB; b++) sum[b] = _mm512_fmadd_ps(odd, one(x + NB + b), sum[b]);
  }
  template <int NB> I512 void times(Sum* sum, __m512i w, const uint32_t* x) {
    both<NB>(sum, _mm512_castsi512_ps(_mm512_slli_epi32(w, 16)),
             _mm512_castsi512_ps(_mm512_and_si512(w, _mm512_set1_epi32((int)0xffff0000))), x);
  }
};
struct Half : Wide {
  template <int NB> I512 void times(Sum* sum, __m512i w, const uint32_t* x) {
    const __m512i order = _mm512_set_epi16(31, 29, 27, 25, 23, 21, 19, 17, 15, 13, 11, 9, 7, 5, 3, 1, 30, 28, 26, 24, 22, 20, 18,
                                           16, 14, 12, 10, 8, 6, 4, 2, 0);
    w = _mm512_permutexvar_epi16(order, w);
    both<NB>(sum, _mm512_cvtph_ps(_mm512_castsi512_si256(w)), _mm512_cvtph_ps(_mm512_extracti64x4_epi64(w, 1)), x);
  }
};
struct Pairs : Halves {
  static constexpr int DWORDS = 1;
  typedef __m512 Sum;
  I512 Sum zero() { return _mm512_setzero_ps(); }
  I512 Sum add(Sum a, Sum b) { return _mm512_add_ps(a, b); }
  template <int NB> I512 void times(Sum* sum, __m512i w, const uint32_t* x) {
    UNROLL for (int b = 0; b < NB; b++)
      sum[b] = _mm512_dpbf16_ps(sum[b], (__m512bh)w, (__m512bh)_mm512_set1_epi32((int)x[b]));
  }
};
struct Bytes : Quarters {  // x is unsigned, 128 above its value: `finish` takes 128 x the row's weights off again
  static constexpr int DWORDS = 1;
  typedef __m512i Sum;
  I512 Sum zero() { return _mm512_setzero_si512(); }
  I512 Sum add(Sum a, Sum b) { return _mm512_add_epi32(a, b); }
  template <int NB> I512 void times(Sum* sum, __m512i w, const uint32_t* x) {
    UNROLL for (int b = 0; b < NB; b++) sum[b] = _mm512_dpbusd_epi32(sum[b], _mm512_set1_epi32((int)x[b]), w);
  }
};

template <class T, int NB>
F512 static void times(const uint8_t* masks, const uint8_t* values, const uint32_t* x, int64_t blocks, uint32_t* out) {
  constexpr int SETS = NB == 1 ? 4 : NB <= 4 ? 2 : 1;  // enough independent sums to hide the latency of an addition
  constexpr int64_t STEP = 4 * sizeof(typename T::Mask);
  typename T::Sum sum[SETS][NB];
  for (int s = 0; s < SETS; s++)
    for (int b = 0; b < NB; b++) sum[s][b] = T::zero();
  for (int64_t i = 0; i < blocks; i += 4, masks += STEP, x += 4 * NB * T::DWORDS) {
    __m512i w[4];
    values = four<T>(masks, values, w);
    UNROLL for (int u = 0; u < 4; u++) asm volatile("" : "+v"(w[u]));  // all four expanded before the first multiply-add
    UNROLL for (int u = 0; u < 4; u++) T::template times<NB>(sum[u % SETS], w[u], x + u * NB * T::DWORDS);
    _mm_prefetch((const char*)values + AHEAD, _MM_HINT_T0);
    if (T::BYTES == 4) _mm_prefetch((const char*)values + AHEAD + 64, _MM_HINT_T0);
    if (i % (64 / sizeof(typename T::Mask)) == 0) _mm_prefetch((const char*)masks + AHEAD / 2, _MM_HINT_T0);
  }
  for (int b = 0; b < NB; b++) {
    typename T::Sum total = sum[0][b];
    for (int s = 1; s < SETS; s++) total = T::add(total, sum[s][b]);
    memcpy(out + 16 * b, &total, 64);
  }
}

// ---- 16 x 16 transposition of dwords: rows of x or W <-> blocks ----
I512 void transpose(__m512i* w) {
  __m512i t[16];
  UNROLL for (int j = 0; j < 8; j++) {
    t[2 * j] = _mm512_unpacklo_epi32(w[2 * j], w[2 * j + 1]);
    t[2 * j + 1] = _mm512_unpackhi_epi32(w[2 * j], w[2 * j + 1]);
  }
  UNROLL for (int j = 0; j < 4; j++) {
    w[4 * j] = _mm512_unpacklo_epi64(t[4 * j], t[4 * j + 2]);
    w[4 * j + 1] = _mm512_unpackhi_epi64(t[4 * j], t[4 * j + 2]);
    w[4 * j + 2] = _mm512_unpacklo_epi64(t[4 * j + 1], t[4 * j + 3]);
    w[4 * j + 3] = _mm512_unpackhi_epi64(t[4 * j + 1], t[4 * j + 3]);
  }
  UNROLL for (int j = 0; j < 4; j++) {
    t[j] = _mm512_shuffle_i32x4(w[j], w[j + 4], 0x88);
    t[j + 4] = _mm512_shuffle_i32x4(w[j], w[j + 4], 0xdd);
    t[j + 8] = _mm512_shuffle_i32x4(w[j + 8], w[j + 12], 0x88);
    t[j + 12] = _mm512_shuffle_i32x4(w[j + 8], w[j + 12], 0xdd);
  }
  UNROLL for (int j = 0; j < 8; j++) {
    w[j] = _mm512_shuffle_i32x4(t[j], t[j + 8], 0x88);
    w[j + 8] = _mm512_shuffle_i32x4(t[j], t[j + 8], 0xdd);
  }
}

I512 __mmask64 first(int64_t bytes) { return bytes >= 64 ? ~0ull : bytes <= 0 ? 0 : _bzhi_u64(~0ull, (unsigned)bytes); }

template <class T> F512 static void unpack(const Plan* plan, int64_t panel, int64_t start, int64_t stop, uint8_t* out) {
  const int64_t row_bytes = plan->columns * T::BYTES, top = panel * ROWS;
  const uint8_t* masks = plan->masks + panel * plan->blocks * sizeof(typename T::Mask);
  const uint8_t* values = plan->values + plan->offsets[panel] * T::BYTES;
  for (int64_t i = 0; i < plan->blocks; i += 16) {
    __m512i w[16];
    UNROLL for (int u = 0; u < 16; u++)
      w[u] = i + u < plan->blocks ? next<T>(masks + (i + u) * sizeof(typename T::Mask), values) : _mm512_setzero_si512();
    transpose(w);
    const __mmask64 inside = first(row_bytes - i * 4);
    for (int r = 0; r < ROWS; r++)
      if (top + r >= start && top + r < stop) _mm512_mask_storeu_epi8(out + (top + r - start) * row_bytes + i * 4, inside, w[r]);
  }
}
F512 static void unpack_any(const Plan* plan, int64_t panel, int64_t start, int64_t stop, uint8_t* out) {
  if (plan->type == FLOAT32) unpack<Words>(plan, panel, start, stop, out);
  else if (plan->type == INT8) unpack<Quarters>(plan, panel, start, stop, out);
  else unpack<Halves>(plan, panel, start, stop, out);
}

// One panel of dense rows -> masks (and their number of bits), or -> values. Reads the weight once each.
template <class T, bool VALUES>
F512 static int64_t pack(const uint8_t* weight, int64_t rows, int64_t columns, int64_t blocks, uint8_t* out) {
  const int64_t row_bytes = columns * T::BYTES;
  int64_t count = 0;
  for (int64_t i = 0; i < blocks; i += 16) {
    __m512i w[16];
    const __mmask64 inside = first(row_bytes - i * 4);
    UNROLL for (int r = 0; r < 16; r++)
      w[r] = r < rows ? _mm512_maskz_loadu_epi8(inside, weight + r * row_bytes + i * 4) : _mm512_setzero_si512();
    transpose(w);
    UNROLL for (int u = 0; u < 16; u++) {
      if (i + u >= blocks) break;
      typename T::Mask mask = T::nonzero(w[u]);
      int n = sizeof(mask) == 8 ? __builtin_popcountll(mask) : __builtin_popcount((uint32_t)mask);
      if (VALUES) {
        T::store(out, n, T::compress(mask, w[u]));
        out += n * T::BYTES;
      } else {
        memcpy(out + (i + u) * sizeof mask, &mask, sizeof mask);
      }
      count += n;
    }
  }
  return count;
}
F512 static int64_t pack_masks(int type, const uint8_t* w, int64_t rows, int64_t columns, int64_t blocks, uint8_t* masks) {
  if (type == FLOAT32) return pack<Words, false>(w, rows, columns, blocks, masks);
  if (type == INT8) return pack<Quarters, false>(w, rows, columns, blocks, masks);
  return pack<Halves, false>(w, rows, columns, blocks, masks);
}
F512 static void pack_values(int type, const uint8_t* w, int64_t rows, int64_t columns, int64_t blocks, uint8_t* values) {
  if (type == FLOAT32) pack<Words, true>(w, rows, columns, blocks, values);
  else if (type == INT8) pack<Quarters, true>(w, rows, columns, blocks, values);
  else pack<Halves, true>(w, rows, columns, blocks, values);
}

// ---- activations in, results out ----
I512 __m512 floats(const uint8_t* x, int type, int64_t at, int64_t columns) {  // 16 activations from `at`, zeros past the end
  const __mmask16 inside = (__mmask16)_bzhi_u32(0xffff, columns - at >= 16 ? 16 : columns > at ? (unsigned)(columns - at) : 0);
  if (type == FLOAT32) return _mm512_maskz_loadu_ps(inside, x + 4 * at);
  __m256i half = _mm256_maskz_loadu_epi16(inside, x + 2 * at);
  if (type == FLOAT16) return _mm512_cvtph_ps(half);
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16));
}

F512 static float convert(const uint8_t* x, int type, int64_t columns, int arithmetic, int64_t dwords, uint32_t* out) {
  if (arithmetic == PAIRS) {
    memcpy(out, x, columns * 2);
    memset((uint8_t*)out + columns * 2, 0, dwords * 4 - columns * 2);
    return 1;
  }
  if (arithmetic != BYTES) {
    for (int64_t d = 0; d < dwords; d += 16)
      _mm512_mask_storeu_ps(out + d, (__mmask16)_bzhi_u32(0xffff, dwords - d >= 16 ? 16 : (unsigned)(dwords - d)),
                            floats(x, type, d, columns));
    return 1;
  }
  const __m512i magnitude = _mm512_set1_epi32(0x7fffffff);
  __m512i top = _mm512_setzero_si512();  // as integers, so that NaN and infinity are the largest
  for (int64_t k = 0; k < columns; k += 16)
    top = _mm512_max_epi32(top, _mm512_and_si512(_mm512_castps_si512(floats(x, type, k, columns)), magnitude));
  const int32_t bits = _mm512_reduce_max_epi32(top);
  float absmax;
  memcpy(&absmax, &bits, 4);
  const bool finite = bits < 0x7f800000, tiny = absmax < 1e-30f;
  const __m512 inverse = _mm512_set1_ps(finite && !tiny ? 127.0f / absmax : 0.0f);
  const __m128i bias = _mm_set1_epi8((char)0x80);
  for (int64_t d = 0; d < dwords; d += 4) {
    __m512 v = floats(x, type, d * 4, columns);
    __m128i q = finite ? _mm512_cvtsepi32_epi8(_mm512_cvtps_epi32(_mm512_mul_ps(v, inverse))) : _mm_setzero_si128();
    _mm_storeu_si128((__m128i*)(out + d), _mm_xor_si128(q, bias));
  }
  return !finite ? __builtin_nanf("") : tiny ? 0.0f : absmax / 127.0f;
}

F512 static void interleave(const uint32_t* x, int64_t dwords, int tokens, uint32_t* out) {
  const __mmask16 lanes = (__mmask16)_bzhi_u32(0xffff, tokens);
  for (int64_t d = 0; d < dwords; d += 16) {
    const int n = dwords - d >= 16 ? 16 : (int)(dwords - d);
    __m512i w[16];
    UNROLL for (int b = 0; b < 16; b++)
      w[b] = b < tokens ? _mm512_maskz_loadu_epi32((__mmask16)_bzhi_u32(0xffff, n), x + b * dwords + d) : _mm512_setzero_si512();
    transpose(w);
    UNROLL for (int j = 0; j < 16; j++)
      if (j < n) _mm512_mask_storeu_epi32(out + (d + j) * tokens, lanes, w[j]);
  }
}

I512 void put(__m512 v, int type, uint8_t* y, __mmask16 rows) {
  if (type == FLOAT32) {
    _mm512_mask_storeu_ps(y, rows, v);
  } else if (type == FLOAT16) {
    _mm256_mask_storeu_epi16(y, rows, _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
  } else {  // round to nearest even by hand: vcvtneps2bf16 flushes denormals
    __m512i bits = _mm512_castps_si512(v);
    __m512i up = _mm512_add_epi32(_mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1)), _mm512_set1_epi32(0x7fff));
    __m512i rounded = _mm512_srli_epi32(_mm512_add_epi32(bits, up), 16);
    rounded = _mm512_mask_mov_epi32(rounded, _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q), _mm512_set1_epi32(0x7fc0));
    _mm256_mask_storeu_epi16(y, rows, _mm512_cvtepi32_epi16(rounded));
  }
}

F512 static void finish(const Plan* plan, const uint32_t* sums, const float* scales, int64_t panel, int tokens, int type, uint8_t* y) {
  const int64_t top = panel * ROWS, left = plan->rows - top, width = type == FLOAT32 ? 4 : 2;
  const __mmask16 rows = (__mmask16)_bzhi_u32(0xffff, left >= ROWS ? ROWS : (unsigned)left);
  const __m512 bias = plan->bias ? _mm512_maskz_loadu_ps(rows, plan->bias + top) : _mm512_setzero_ps();
  for (int b = 0; b < tokens; b++) {
    __m512 v = _mm512_loadu_ps(sums + 16 * b);
    if (plan->type == INT8) {
      __m512i offset = _mm512_slli_epi32(_mm512_maskz_loadu_epi32(rows, plan->sums + top), 7);
      __m512 scale = _mm512_mul_ps(_mm512_maskz_loadu_ps(rows, plan->scales + top), _mm512_set1_ps(scales[b]));
      v = _mm512_mul_ps(_mm512_cvtepi32_ps(_mm512_sub_epi32(_mm512_castps_si512(v), offset)), scale);
    }
    if (plan->bias) v = _mm512_add_ps(v, bias);
    put(v, type, y + (b * plan->rows + top) * width, rows);
  }
}

#include "avx512_dense.h"

#define ALL(T) \
  { times<T, 1>, times<T, 2>, times<T, 3>, times<T, 4>, times<T, 5>, times<T, 6>, times<T, 7>, times<T, 8>, times<T, 9>, \
    times<T, 10>, times<T, 11>, times<T, 12>, times<T, 13>, times<T, 14>, times<T, 15>, times<T, 16> }
static const Paths PATHS = {{16, 16, 16, 16, 16}, {ALL(Single), ALL(Wide), ALL(Pairs), ALL(Half), ALL(Bytes)}, convert,
                            interleave, finish, unpack_any, pack_masks, pack_values, dense};
#undef ALL
}  // namespace avx512
