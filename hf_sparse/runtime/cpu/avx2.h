// The AVX2 path (with FMA and F16C). A block of plan.h is two registers of 8 rows. There is no expand instruction: 8 mask
// bits select a shuffle from a table, which moves the next stored entries to their places and zeroes the others.
// bfloat16 weights always meet float32 activations here; int8 products are exact by |w| x sign(w) x, whose pairs stay below
// 2^15 for weights and activations of at most 128 and 127.
#pragma once
#include "plan.h"

namespace avx2 {
#define F256 __attribute__((target("avx2,fma,f16c,bmi2,popcnt")))
#define I256 static INLINE F256

struct Tables {
  uint8_t place[256][8];    // entry of the packed values for each of 8 places; 0x80 where the bit is not set
  uint8_t place2[256][16];  // the same for 2-byte entries, as bytes
};
constexpr Tables make_tables() {
  Tables t = {};
  for (int mask = 0; mask < 256; mask++)
    for (int bit = 0, n = 0; bit < 8; bit++) {
      const bool set = mask >> bit & 1;
      t.place[mask][bit] = set ? n : 0x80;
      t.place2[mask][2 * bit] = set ? 2 * n : 0x80;
      t.place2[mask][2 * bit + 1] = set ? 2 * n + 1 : 0x80;
      n += set;
    }
  return t;
}
alignas(64) static constexpr Tables TABLES = make_tables();

struct Block {
  __m256i low, high;  // rows 0-7, 8-15
};
I256 int count(uint64_t mask, int bits) { return __builtin_popcountll(_bzhi_u64(mask, bits)); }
I256 __m256i pair(__m128i low, __m128i high) { return _mm256_inserti128_si256(_mm256_castsi128_si256(low), high, 1); }

struct Words {
  typedef uint16_t Mask;
  static constexpr int BYTES = 4;
  I256 __m256i eight(uint8_t mask, const uint8_t* v) {
    __m256i place = _mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i*)TABLES.place[mask]));
    __m256i moved = _mm256_permutevar8x32_epi32(_mm256_loadu_si256((const __m256i*)v), place);
    return _mm256_andnot_si256(_mm256_srai_epi32(place, 31), moved);
  }
  I256 Block expand(Mask m, const uint8_t* v) { return {eight((uint8_t)m, v), eight((uint8_t)(m >> 8), v + 4 * count(m, 8))}; }
  I256 Mask nonzero(Block b) {
    const __m256i zero = _mm256_setzero_si256();
    int low = _mm256_movemask_ps(_mm256_castsi256_ps(_mm256_cmpeq_epi32(b.low, zero)));
    int high = _mm256_movemask_ps(_mm256_castsi256_ps(_mm256_cmpeq_epi32(b.high, zero)));
    return (Mask) ~(low | high << 8);
  }
};
struct Halves {
  typedef uint32_t Mask;
  static constexpr int BYTES = 2;
  I256 __m128i eight(uint32_t mask, const uint8_t* v) {
    return _mm_shuffle_epi8(_mm_loadu_si128((const __m128i*)v), _mm_load_si128((const __m128i*)TABLES.place2[mask & 255]));
  }
  I256 Block expand(Mask m, const uint8_t* v) {
    return {pair(eight(m, v), eight(m >> 8, v + 2 * count(m, 8))),
            pair(eight(m >> 16, v + 2 * count(m, 16)), eight(m >> 24, v + 2 * count(m, 24)))};
  }
  I256 Mask nonzero(Block b) {
    const __m256i zero = _mm256_setzero_si256();
    __m256i both = _mm256_packs_epi16(_mm256_cmpeq_epi16(b.low, zero), _mm256_cmpeq_epi16(b.high, zero));
    return ~(Mask)_mm256_movemask_epi8(_mm256_permute4x64_epi64(both, 0xd8));
  }
};
struct Quarters {
  typedef uint64_t Mask;
  static constexpr int BYTES = 1;
  I256 __m128i eight(uint64_t mask, int from, const uint8_t* v) {
    return _mm_shuffle_epi8(_mm_loadl_epi64((const __m128i*)(v + count(mask, from))),
                            _mm_loadl_epi64((const __m128i*)TABLES.place[mask >> from & 255]));
  }
  I256 __m256i half(uint64_t mask, int from, const uint8_t* v) {
    return pair(_mm_unpacklo_epi64(eight(mask, from, v), eight(mask, from + 8, v)),
                _mm_unpacklo_epi64(eight(mask, from + 16, v), eight(mask, from + 24, v)));
  }
  I256 Block expand(Mask m, const uint8_t* v) { return {half(m, 0, v), half(m, 32, v)}; }
  I256 Mask nonzero(Block b) {
    const __m256i zero = _mm256_setzero_si256();
    uint32_t low = (uint32_t)_mm256_movemask_epi8(_mm256_cmpeq_epi8(b.low, zero));
    uint32_t high = (uint32_t)_mm256_movemask_epi8(_mm256_cmpeq_epi8(b.high, zero));
    return ~((Mask)high << 32 | low);
  }
};

template <class T> I256 Block next(const uint8_t* masks, const uint8_t*& values) {
  typename T::Mask mask = read<typename T::Mask>(masks);
  Block block = T::expand(mask, values);
  values += __builtin_popcountll(mask) * T::BYTES;
  return block;
}

// ---- arithmetic: sum is [NB][2], rows 0-7 and 8-15 ----
I256 __m256 one(const uint32_t* x) { return _mm256_castsi256_ps(_mm256_set1_epi32((int)*x)); }

struct FloatSum {
  typedef __m256 Sum;
  I256 Sum zero() { return _mm256_setzero_ps(); }
  I256 Sum add(Sum a, Sum b) { return _mm256_add_ps(a, b); }
  template <int NB> I256 void column(Sum (*sum)[2], __m256 low, __m256 high, const uint32_t* x) {
    UNROLL for (int b = 0; b < NB; b++) {
      const __m256 v = one(x + b);
      sum[b][0] = _mm256_fmadd_ps(low, v, sum[b][0]);
      sum[b][1] = _mm256_fmadd_ps(high, v, sum[b][1]);
    }
  }
};
struct Single : Words, FloatSum {
  static constexpr int DWORDS = 1;
  template <int NB> I256 void times(Sum (*sum)[2], Block w, const uint32_t* x) {
    column<NB>(sum, _mm256_castsi256_ps(w.low), _mm256_castsi256_ps(w.high), x);
  }
};
struct Wide : Halves, FloatSum {
  static constexpr int DWORDS = 2;
  I256 __m256 even(__m256i w) { return _mm256_castsi256_ps(_mm256_slli_epi32(w, 16)); }
  I256 __m256 odd(__m256i w) { return _mm256_castsi256_ps(_mm256_and_si256(w, _mm256_set1_epi32((int)0xffff0000))); }
  template <int NB> I256 void times(Sum (*sum)[2], Block w, const uint32_t* x) {
    column<NB>(sum, even(w.low), even(w.high), x);
    column<NB>(sum, odd(w.low), odd(w.high), x + NB);
  }
};
struct Half : Halves, FloatSum {
  static constexpr int DWORDS = 2;
  I256 __m256i apart(__m256i w) {  // first columns of 8 rows, then second columns
    const __m256i order = _mm256_setr_epi8(0, 1, 4, 5, 8, 9, 12, 13, 2, 3, 6, 7, 10, 11, 14, 15, 0, 1, 4, 5, 8, 9, 12, 13, 2, 3,
                                           6, 7, 10, 11, 14, 15);
    return _mm256_permute4x64_epi64(_mm256_shuffle_epi8(w, order), 0xd8);
  }
  template <int NB> I256 void times(Sum (*sum)[2], Block w, const uint32_t* x) {
    const __m256i low = apart(w.low), high = apart(w.high);
    column<NB>(sum, _mm256_cvtph_ps(_mm256_castsi256_si128(low)), _mm256_cvtph_ps(_mm256_castsi256_si128(high)), x);
    column<NB>(sum, _mm256_cvtph_ps(_mm256_extracti128_si256(low, 1)), _mm256_cvtph_ps(_mm256_extracti128_si256(high, 1)),
               x + NB);
  }
};
struct Bytes : Quarters {
  static constexpr int DWORDS = 1;
  typedef __m256i Sum;
  I256 Sum zero() { return _mm256_setzero_si256(); }
  I256 Sum add(Sum a, Sum b) { return _mm256_add_epi32(a, b); }
  I256 __m256i product(__m256i absolute, __m256i w, __m256i x) {
    return _mm256_madd_epi16(_mm256_maddubs_epi16(absolute, _mm256_sign_epi8(x, w)), _mm256_set1_epi16(1));
  }
  template <int NB> I256 void times(Sum (*sum)[2], Block w, const uint32_t* x) {
    const __m256i low = _mm256_abs_epi8(w.low), high = _mm256_abs_epi8(w.high);
    UNROLL for (int b = 0; b < NB; b++) {
      const __m256i v = _mm256_set1_epi32((int)x[b]);
      sum[b][0] = _mm256_add_epi32(sum[b][0], product(low, w.low, v));
      sum[b][1] = _mm256_add_epi32(sum[b][1], product(high, w.high, v));
    }
  }
};

template <class T, int NB>
F256 static void times(const uint8_t* masks, const uint8_t* values, const uint32_t* x, int64_t blocks, uint32_t* out) {
  constexpr int SETS = NB <= 2 ? 2 : 1;
  typename T::Sum sum[SETS][NB][2];
  for (int s = 0; s < SETS; s++)
    for (int b = 0; b < NB; b++) sum[s][b][0] = sum[s][b][1] = T::zero();
  for (int64_t i = 0; i < blocks; i += 2, masks += 2 * sizeof(typename T::Mask), x += 2 * NB * T::DWORDS) {
    Block w[2];
    UNROLL for (int u = 0; u < 2; u++) w[u] = next<T>(masks + u * sizeof(typename T::Mask), values);
    UNROLL for (int u = 0; u < 2; u++) T::template times<NB>(sum[u % SETS], w[u], x + u * NB * T::DWORDS);
    _mm_prefetch((const char*)values + 1024, _MM_HINT_T0);
  }
  for (int b = 0; b < NB; b++)
    for (int half = 0; half < 2; half++) {
      typename T::Sum total = sum[0][b][half];
      if (SETS == 2) total = T::add(total, sum[SETS - 1][b][half]);
      memcpy(out + 16 * b + 8 * half, &total, 32);
    }
}

// ---- packing and unpacking ----
I256 void transpose(__m256i* w) {  // 8 x 8 dwords
  __m256i t[8];
  UNROLL for (int j = 0; j < 4; j++) {
    t[2 * j] = _mm256_unpacklo_epi32(w[2 * j], w[2 * j + 1]);
    t[2 * j + 1] = _mm256_unpackhi_epi32(w[2 * j], w[2 * j + 1]);
  }
  UNROLL for (int j = 0; j < 2; j++) {
    w[4 * j] = _mm256_unpacklo_epi64(t[4 * j], t[4 * j + 2]);
    w[4 * j + 1] = _mm256_unpackhi_epi64(t[4 * j], t[4 * j + 2]);
    w[4 * j + 2] = _mm256_unpacklo_epi64(t[4 * j + 1], t[4 * j + 3]);
    w[4 * j + 3] = _mm256_unpackhi_epi64(t[4 * j + 1], t[4 * j + 3]);
  }
  UNROLL for (int j = 0; j < 4; j++) {
    t[j] = _mm256_permute2x128_si256(w[j], w[j + 4], 0x20);
    t[j + 4] = _mm256_permute2x128_si256(w[j], w[j + 4], 0x31);
  }
  memcpy(w, t, sizeof t);
}

template <class T> F256 static void unpack(const Plan* plan, int64_t panel, int64_t start, int64_t stop, uint8_t* out) {
  const int64_t row_bytes = plan->columns * T::BYTES, top = panel * ROWS;
  const uint8_t* masks = plan->masks + panel * plan->blocks * sizeof(typename T::Mask);
  const uint8_t* values = plan->values + plan->offsets[panel] * T::BYTES;
  const int from = top < start ? (int)(start - top) : 0, to = stop - top < ROWS ? (int)(stop - top) : ROWS;
  for (int64_t i = 0; i < plan->blocks && i * 4 < row_bytes; i += 8) {
    __m256i rows[16];
    for (int u = 0; u < 8; u++) {
      const Block block =
          i + u < plan->blocks ? next<T>(masks + (i + u) * sizeof(typename T::Mask), values) : Block{};
      rows[u] = block.low;
      rows[8 + u] = block.high;
    }
    transpose(rows);
    transpose(rows + 8);
    const int64_t width = row_bytes - i * 4 < 32 ? row_bytes - i * 4 : 32;
    for (int r = from; r < to; r++) {
      uint8_t* at = out + (top + r - start) * row_bytes + i * 4;
      if (width == 32) _mm256_storeu_si256((__m256i*)at, rows[r]);
      else memcpy(at, rows + r, width);
    }
  }
}
F256 static void unpack_any(const Plan* plan, int64_t panel, int64_t start, int64_t stop, uint8_t* out) {
  if (plan->type == FLOAT32) unpack<Words>(plan, panel, start, stop, out);
  else if (plan->type == INT8) unpack<Quarters>(plan, panel, start, stop, out);
  else unpack<Halves>(plan, panel, start, stop, out);
}

template <class T, bool VALUES>
F256 static int64_t pack(const uint8_t* weight, int64_t rows, int64_t columns, int64_t blocks, uint8_t* out) {
  const int64_t row_bytes = columns * T::BYTES;
  int64_t total = 0;
  for (int64_t i = 0; i < blocks; i++) {
    uint8_t lanes[64] = {};
    const int64_t width = row_bytes - i * 4;
    for (int r = 0; r < rows; r++) {
      if (width >= 4) memcpy(lanes + 4 * r, weight + r * row_bytes + i * 4, 4);
      else if (width > 0) memcpy(lanes + 4 * r, weight + r * row_bytes + i * 4, width);
    }
    Block block;
    memcpy(&block, lanes, 64);
    typename T::Mask mask = T::nonzero(block);
    total += __builtin_popcountll(mask);
    if (VALUES) {
      for (uint64_t left = mask; left; left &= left - 1, out += T::BYTES)
        memcpy(out, lanes + __builtin_ctzll(left) * T::BYTES, T::BYTES);
    } else {
      memcpy(out + i * sizeof mask, &mask, sizeof mask);
    }
  }
  return total;
}
F256 static int64_t pack_masks(int type, const uint8_t* w, int64_t rows, int64_t columns, int64_t blocks, uint8_t* masks) {
  if (type == FLOAT32) return pack<Words, false>(w, rows, columns, blocks, masks);
  if (type == INT8) return pack<Quarters, false>(w, rows, columns, blocks, masks);
  return pack<Halves, false>(w, rows, columns, blocks, masks);
}
F256 static void pack_values(int type, const uint8_t* w, int64_t rows, int64_t columns, int64_t blocks, uint8_t* values) {
  if (type == FLOAT32) pack<Words, true>(w, rows, columns, blocks, values);
  else if (type == INT8) pack<Quarters, true>(w, rows, columns, blocks, values);
  else pack<Halves, true>(w, rows, columns, blocks, values);
}

// ---- activations in, results out ----
I256 __m256 floats(const uint8_t* x, int type, int64_t at, int64_t columns) {  // 8 activations from `at`, zeros past the end
  const int64_t width = type == FLOAT32 ? 4 : 2, left = columns - at;
  uint8_t tail[32] = {};
  const uint8_t* from = x + at * width;
  if (left < 8) {
    if (left > 0) memcpy(tail, from, left * width);
    from = tail;
  }
  if (type == FLOAT32) return _mm256_loadu_ps((const float*)from);
  __m128i half = _mm_loadu_si128((const __m128i*)from);
  if (type == FLOAT16) return _mm256_cvtph_ps(half);
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(half), 16));
}

F256 static float convert(const uint8_t* x, int type, int64_t columns, int arithmetic, int64_t dwords, uint32_t* out) {
  if (arithmetic != BYTES) {
    for (int64_t d = 0; d < dwords; d += 8) {
      float v[8];
      _mm256_storeu_ps(v, floats(x, type, d, columns));
      memcpy(out + d, v, (dwords - d < 8 ? dwords - d : 8) * 4);
    }
    return 1;
  }
  __m256i top = _mm256_setzero_si256();  // as integers, so that NaN and infinity are the largest
  for (int64_t k = 0; k < columns; k += 8)
    top = _mm256_max_epi32(top, _mm256_and_si256(_mm256_castps_si256(floats(x, type, k, columns)), _mm256_set1_epi32(0x7fffffff)));
  int32_t tops[8], bits = 0;
  memcpy(tops, &top, 32);
  for (int j = 0; j < 8; j++) bits = tops[j] > bits ? tops[j] : bits;
  float absmax;
  memcpy(&absmax, &bits, 4);
  const bool finite = bits < 0x7f800000, tiny = absmax < 1e-30f;
  const __m256 inverse = _mm256_set1_ps(finite && !tiny ? 127.0f / absmax : 0.0f);
  for (int64_t d = 0; d < dwords; d += 2) {
    int32_t q[8] = {};
    if (finite) _mm256_storeu_si256((__m256i*)q, _mm256_cvtps_epi32(_mm256_mul_ps(floats(x, type, d * 4, columns), inverse)));
    for (int j = 0; j < 8; j++) ((int8_t*)(out + d))[j] = (int8_t)q[j];
  }
  return !finite ? __builtin_nanf("") : tiny ? 0.0f : absmax / 127.0f;
}

template <int NB> F256 static void interleave_n(const uint32_t* x, int64_t dwords, uint32_t* out) {
  for (int64_t d = 0; d < dwords; d++)
    for (int b = 0; b < NB; b++) out[d * NB + b] = x[b * dwords + d];
}
F256 static void interleave(const uint32_t* x, int64_t dwords, int tokens, uint32_t* out) {
  if (tokens == 2) interleave_n<2>(x, dwords, out);
  else if (tokens == 3) interleave_n<3>(x, dwords, out);
  else interleave_n<4>(x, dwords, out);
}

I256 __m128i bfloat16(__m256 v) {  // to nearest even
  __m256i bits = _mm256_castps_si256(v);
  __m256i up = _mm256_add_epi32(_mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1)), _mm256_set1_epi32(0x7fff));
  __m256i rounded = _mm256_srli_epi32(_mm256_add_epi32(bits, up), 16);
  __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(v, v, _CMP_UNORD_Q));
  rounded = _mm256_blendv_epi8(rounded, _mm256_set1_epi32(0x7fc0), nan);
  return _mm256_castsi256_si128(_mm256_permute4x64_epi64(_mm256_packus_epi32(rounded, rounded), 0xd8));
}

F256 static void finish(const Plan* plan, const uint32_t* sums, const float* scales, int64_t panel, int tokens, int type, uint8_t* y) {
  const int64_t top = panel * ROWS, left = plan->rows - top, rows = left < ROWS ? left : ROWS, width = type == FLOAT32 ? 4 : 2;
  float bias[16] = {}, scale[16] = {};
  if (plan->bias) memcpy(bias, plan->bias + top, rows * 4);
  if (plan->type == INT8) memcpy(scale, plan->scales + top, rows * 4);
  for (int b = 0; b < tokens; b++) {
    uint8_t rounded[64];
    for (int half = 0; half < 2; half++) {
      __m256 v = _mm256_loadu_ps((const float*)sums + 16 * b + 8 * half);
      if (plan->type == INT8)
        v = _mm256_mul_ps(_mm256_cvtepi32_ps(_mm256_castps_si256(v)),
                          _mm256_mul_ps(_mm256_loadu_ps(scale + 8 * half), _mm256_set1_ps(scales[b])));
      if (plan->bias) v = _mm256_add_ps(v, _mm256_loadu_ps(bias + 8 * half));
      if (type == FLOAT32) _mm256_storeu_ps((float*)rounded + 8 * half, v);
      else
        _mm_storeu_si128((__m128i*)rounded + half,
                         type == FLOAT16 ? _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC) : bfloat16(v));
    }
    memcpy(y + (b * plan->rows + top) * width, rounded, rows * width);
  }
}

#include "avx2_dense.h"

#define ALL(T) {times<T, 1>, times<T, 2>, times<T, 3>, times<T, 4>}
static const Paths PATHS = {{4, 4, 4, 4, 4}, {ALL(Single), ALL(Wide), {}, ALL(Half), ALL(Bytes)}, convert, interleave, finish,
                            unpack_any, pack_masks, pack_values, dense};
#undef ALL
}  // namespace avx2
