// What one packed weight looks like in memory, and what an instruction set has to provide.
//
// W [rows, columns] is cut into panels of 16 rows. Inside a panel, k runs over `blocks` blocks; a block is 16 rows x G
// columns = 64 bytes of dense weight, row by row, so that each row holds one 32-bit lane:
//
//     dtype     bytes  G  mask        lane r of block i
//     float32   4      1  16 bits     W[r, i]
//     bfloat16  2      2  32 bits     W[r, 2i], W[r, 2i+1]
//     float16   2      2  32 bits     the same
//     int8      1      4  64 bits     W[r, 4i .. 4i+3]
//
// Bit r*G + g of the mask (little endian) says whether W[r, G*i + g] is stored; the stored entries follow each other in
// the order of the bits. `blocks` is a multiple of 4: the last blocks, and rows past the end, have empty masks.
// Entries of panel p are values[offsets[p] : offsets[p+1]]. 64 bytes after the last entry are allocated and read, never
// used: a block is read as one whole vector.
#pragma once
#include <immintrin.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

enum Type { FLOAT32, BFLOAT16, FLOAT16, INT8 };
// How a block meets the activations: the dtypes of both and the instruction.
enum Arithmetic {
  SINGLE,  // float32 x float32
  WIDE,    // bfloat16 weights x float32 activations, exact products
  PAIRS,   // bfloat16 x bfloat16 by vdpbf16ps
  HALF,    // float16 weights x float32 activations, exact products
  BYTES,   // int8 weights x activations quantized to 8 bits, exact int32 sums
  ARITHMETICS
};
enum Isa { AVX2 = 1, AVX512 = 2, AVX512_BF16 = 3 };

struct Plan {  // mirrored by a ctypes.Structure in panels.py
  const uint8_t* masks;    // [panels, blocks] of 2, 4 or 8 bytes
  const uint8_t* values;
  const int64_t* offsets;  // [panels + 1]
  const float* bias;       // [rows] or null
  const float* scales;     // [rows], int8 only
  const int32_t* sums;     // [rows], int8 only: sum of the weights of each row
  int64_t rows, columns, panels, blocks;
  int32_t type, isa;
};

constexpr int ROWS = 16;            // rows of a panel
constexpr int MAX_TOKENS = 16;      // columns of x that one pass over a panel can take
constexpr int64_t MASK_BYTES[] = {2, 4, 4, 8}, VALUE_BYTES[] = {4, 2, 2, 1}, GROUP[] = {1, 2, 2, 4};

// One panel times `tokens` columns of x, which is [blocks, dwords of a block, tokens]; sums go to out [tokens, 16].
typedef void (*PanelTimes)(const uint8_t* masks, const uint8_t* values, const uint32_t* x, int64_t blocks, uint32_t* out);

struct Paths {  // the functions of one instruction set
  int max_tokens[ARITHMETICS];
  PanelTimes times[ARITHMETICS][MAX_TOKENS];
  // One token's activations as the dwords an arithmetic wants, zero up to `dwords`; returns the scale (BYTES) or 1.
  float (*convert)(const uint8_t* x, int type, int64_t columns, int arithmetic, int64_t dwords, uint32_t* out);
  void (*interleave)(const uint32_t* x, int64_t dwords, int tokens, uint32_t* out);  // [tokens, dwords] -> [dwords, tokens]
  // Sums of a panel -> rounded outputs: scale, bias, rounding, bounds.
  void (*finish)(const Plan* plan, const uint32_t* sums, const float* scales, int64_t panel, int tokens, int type, uint8_t* y);
  void (*unpack)(const Plan* plan, int64_t panel, int64_t start, int64_t stop, uint8_t* out);
  int64_t (*masks)(int type, const uint8_t* weight, int64_t rows, int64_t columns, int64_t blocks, uint8_t* masks);
  void (*values)(int type, const uint8_t* weight, int64_t rows, int64_t columns, int64_t blocks, uint8_t* values);
  void (*dense)(const uint8_t* weight, int type, int64_t rows, int64_t columns, const uint32_t* x, int64_t dwords, int tokens,
                float* out);  // out [tokens, 16], rows <= 16
};

#define INLINE inline __attribute__((always_inline))
#if defined(__clang__)
#define UNROLL _Pragma("clang loop unroll(full)")
#else
#define UNROLL _Pragma("GCC unroll 16")
#endif

template <class T> static INLINE T read(const uint8_t* from) {
  T value;
  memcpy(&value, from, sizeof value);
  return value;
}
