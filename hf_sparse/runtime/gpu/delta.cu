// y = x W^T for W [rows, columns] packed as in delta.py: a row is a run of octets of 8 consecutive nonzeros.
//
//   values     16 bytes an octet        the 8 weights
//   gaps       4 bytes an octet         8 nibbles: distance to the nonzero before, minus 1
//   row_start  int32 [rows + 1]         octets
//   bases      u16 [rows, blocks]       where in the row the b-th 32 octets begin: 1 + column of the nonzero before
//
// Each lane of a warp takes an octet: one 16-byte and one 4-byte load for 8 nonzeros. Where its nonzeros lie is a prefix sum
// three times over. Within the octet, bytes are summed by a multiplication: with E the four even gaps as bytes,
// E * 0x01010101 has E0, E0+E1, ... in its bytes, which cannot overflow (8 * 16 = 128). Across lanes, five shuffles, for two
// octets of a lane at once (their sums fit 16 bits). Across the 32-octet blocks of the row, the stored bases. So no block waits
// for another, and SPLIT warps can share a row. x lies in shared memory as columns of TOKENS numbers and is gathered from there.
//
// Compile-time: HALF, EARLY (primitives.cuh), TOKENS 1..4, WARPS a block, SPLIT warps a row, BLOCKS a multiprocessor.

#define STEP 2  // octets of a lane in flight: one shuffle scan serves both
#define GROUPS (WARPS / SPLIT)

struct Octets {
  uint4 value[STEP];
  u32 gap[STEP], base[STEP];
};

INLINE void load_octets(Octets& o, const uint4* values, const u32* gaps, const u16* bases, int p, int end, int b) {
#pragma unroll
  for (int u = 0; u < STEP; u++) {
    o.value[u] = make_uint4(0, 0, 0, 0);
    o.gap[u] = 0;
    o.base[u] = 0;
    int i = p + u * 32 * SPLIT;
    if (i < end) {
      o.value[u] = load_once(values + i);
      o.gap[u] = load_once(gaps + i);
      o.base[u] = load_u16(bases + b + u * SPLIT);
    }
  }
}

#if TOKENS == 1
#define WIDTH 4  // bytes of x a column: float32 for one token, else pairs of 16-bit numbers
#define SUMS 2
#else
#define WIDTH (4 * ((TOKENS + 1) / 2))
#define SUMS TOKENS
#endif

// x of a column for all tokens
struct Column {
#if TOKENS == 1
  float x;
#elif TOKENS == 2
  u32 x;
#else
  uint2 x;
#endif
};

INLINE Column gather(u32 at) {
#if TOKENS == 1
  return {shared_f32(at)};
#elif TOKENS == 2
  return {shared_u32(at)};
#else
  return {shared_u64(at)};
#endif
}

INLINE void multiply(float* sum, float w, const Column& c, int high) {
#if TOKENS == 1
  sum[high] += w * c.x;  // two sums, so that one multiply-add need not wait for the one before
#elif TOKENS == 2
  sum[0] += w * widen_low(c.x);
  sum[1] += w * widen_high(c.x);
#else
  sum[0] += w * widen_low(c.x.x);
  sum[1] += w * widen_high(c.x.x);
  sum[2] += w * widen_low(c.x.y);
  if (TOKENS == 4) sum[TOKENS - 1] += w * widen_high(c.x.y);
#endif
}

// x [TOKENS, columns] to shared memory, column by column; after the last column come 8 of zeros, which the padding of an
// octet may point at
INLINE void stage(u32 xs, const u16* x, int columns) {
  int whole = (columns % 8 == 0 && ((u64)x & 15) == 0) ? columns / 8 : 0;
  for (int c = thread(); c < whole; c += WARPS * 32) {
#if TOKENS == 1
    uint4 v = load_again(x + 8 * c);
    u32 w[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
    for (int i = 0; i < 2; i++)
      set_shared_u128(xs + 32 * c + 16 * i, __float_as_uint(widen_low(w[2 * i])), __float_as_uint(widen_high(w[2 * i])),
                      __float_as_uint(widen_low(w[2 * i + 1])), __float_as_uint(widen_high(w[2 * i + 1])));
#else
    uint4 v[2 * ((TOKENS + 1) / 2)];
#pragma unroll
    for (int n = 0; n < 2 * ((TOKENS + 1) / 2); n++)
      v[n] = n < TOKENS ? load_again(x + (u64)n * columns + 8 * c) : make_uint4(0, 0, 0, 0);
#pragma unroll
    for (int n = 0; n < TOKENS; n += 2) {
      u32 a[4] = {v[n].x, v[n].y, v[n].z, v[n].w}, b[4] = {v[n + 1].x, v[n + 1].y, v[n + 1].z, v[n + 1].w};
#pragma unroll
      for (int i = 0; i < 4; i++) {
        set_shared_u32(xs + (8 * c + 2 * i) * WIDTH + 2 * n, __byte_perm(a[i], b[i], 0x5410));
        set_shared_u32(xs + (8 * c + 2 * i + 1) * WIDTH + 2 * n, __byte_perm(a[i], b[i], 0x7632));
      }
    }
#endif
  }
  for (int c = 8 * whole + thread(); c < columns + 8; c += WARPS * 32) {
#if TOKENS == 1
    set_shared_f32(xs + 4 * c, c < columns ? widen(x[c]) : 0.f);
#else
    for (int n = 0; n < 2 * ((TOKENS + 1) / 2); n++)
      set_shared_u16(xs + c * WIDTH + 2 * n, n < TOKENS && c < columns ? x[(u64)n * columns + c] : (u16)0);
#endif
  }
}

// every pointer that changes from call to call comes first
KERNEL(WARPS * 32, BLOCKS)
delta_linear(const u16* x, u16* y, const uint4* values, const u32* gaps, const int* row_start, const u16* bases,
             const u16* bias, int rows, int columns, int blocks) {
  int lane = lane_id(), warp = warp_id(), part = warp % SPLIT;
  int stride = grid_x() * GROUPS, row = block_x() * GROUPS + warp / SPLIT;
  u32 xs = shared_base();
  u32 partial = xs + ((columns + 8) * WIDTH + 15) / 16 * 16;  // [row of this block, SPLIT, TOKENS] float32, if SPLIT > 1

  // the weights do not depend on the kernel before: fetch the first ones while it may still run
  Octets now, next;
  int begin = 0, end = 0, next_begin = 0, next_end = 0;
  if (row < rows) {
    begin = load_int(row_start + row);
    end = load_int(row_start + row + 1);
  }
  int p = begin + part * 32;
  load_octets(now, values, gaps, bases, p + lane, end, row * blocks + part);
  if (row + stride < rows) {
    next_begin = load_int(row_start + row + stride);
    next_end = load_int(row_start + row + stride + 1);
  }
  let_next_kernel_start();
  wait_for_previous_kernel();
  stage(xs, x, columns);
  barrier_all();

  for (int turn = 0; row < rows; turn++) {
    float sum[SUMS];
#pragma unroll
    for (int n = 0; n < SUMS; n++) sum[n] = 0.f;
    int b = row * blocks + part;
    do {
      int q = p + 32 * SPLIT * STEP;
      bool last = q >= end;
      if (last)
        load_octets(next, values, gaps, bases, next_begin + part * 32 + lane, next_end, (row + stride) * blocks + part);
      else
        load_octets(next, values, gaps, bases, q + lane, end, b + SPLIT * STEP);
      if (p < end) {
        u32 even[STEP], odd[STEP], total = 0;
#pragma unroll
        for (int u = 0; u < STEP; u++) {
          u32 e = (now.gap[u] & 0x0f0f0f0fu) * 0x01010101u + 0x04030201u;
          u32 o = ((now.gap[u] >> 4) & 0x0f0f0f0fu) * 0x01010101u + 0x04030201u;
          even[u] = e + (o << 8);
          odd[u] = e + o;
          total += (odd[u] >> 24) << (16 * u);
        }
        u32 before = warp_scan(total) - total;
#pragma unroll
        for (int u = 0; u < STEP; u++) {
          if (p + lane + u * 32 * SPLIT < end) {
            u32 at = xs + (now.base[u] + (u ? before >> 16 : before & 0xffffu) - 1) * WIDTH;
            u32 v[4] = {now.value[u].x, now.value[u].y, now.value[u].z, now.value[u].w};
            Column x[8];  // all gathers before the first product: an instruction that waits for a load stops the warp
#pragma unroll
            for (int j = 0; j < 4; j++) {
              x[2 * j] = gather(at + byte_of(even[u], j) * WIDTH);
              x[2 * j + 1] = gather(at + byte_of(odd[u], j) * WIDTH);
            }
#pragma unroll
            for (int j = 0; j < 4; j++) {
              multiply(sum, widen_low(v[j]), x[2 * j], 0);
              multiply(sum, widen_high(v[j]), x[2 * j + 1], 1);
            }
          }
        }
      }
      now = next;
      p = q;
      b += SPLIT * STEP;
      if (last) break;
    } while (true);

    if (TOKENS == 1) sum[0] += sum[SUMS - 1];
#pragma unroll
    for (int n = 0; n < TOKENS; n++) sum[n] = warp_sum(sum[n]);
    if (lane == 0) {
#pragma unroll
      for (int n = 0; n < TOKENS; n++) {
        if (SPLIT == 1) {
          float with = sum[n] + (bias ? widen(bias[row]) : 0.f);
          y[(u64)n * rows + row] = narrow(with);
        } else {
          set_shared_f32(partial + (((turn * GROUPS + warp / SPLIT) * SPLIT + part) * TOKENS + n) * 4, sum[n]);
        }
      }
    }
    row += stride;
    p = next_begin + part * 32;
    end = next_end;
    next_begin = next_end = 0;
    if (row + stride < rows) {
      next_begin = load_int(row_start + row + stride);
      next_end = load_int(row_start + row + stride + 1);
    }
  }

  if (SPLIT > 1) {  // the warps of a row meet once, at the end: all rows of this block together
    barrier_all();
    for (int i = thread();; i += WARPS * 32) {
      int local = i / TOKENS, n = i % TOKENS;
      int to = (local / GROUPS) * stride + block_x() * GROUPS + local % GROUPS;
      if ((local / GROUPS) * stride >= rows) break;
      if (to >= rows) continue;
      float with = bias ? widen(bias[to]) : 0.f;
#pragma unroll
      for (int s = 0; s < SPLIT; s++) with += shared_f32(partial + ((local * SPLIT + s) * TOKENS + n) * 4);
      y[(u64)n * rows + to] = narrow(with);
    }
  }
}

// The dense weight back: a block a row at a time, spread out in shared memory and written in one piece.
KERNEL(WARPS * 32, BLOCKS)
delta_unpack(u16* out, const uint4* values, const u32* gaps, const int* row_start, const u16* bases, int rows, int columns,
             int blocks) {
  int lane = lane_id(), warp = warp_id();
  u32 line = shared_base();
  int words = (columns + 8 + 7) / 8;  // of 16 bytes
  for (int row = block_x(); row < rows; row += grid_x()) {
    for (int c = thread(); c < words; c += WARPS * 32) set_shared_u128(line + 16 * c, 0, 0, 0, 0);
    barrier_all();
    int begin = load_int(row_start + row), end = load_int(row_start + row + 1);
    for (int b = warp; begin + 32 * b < end; b += WARPS) {
      int i = begin + 32 * b + lane;
      u32 d = i < end ? load_once(gaps + i) : 0;
      u32 e = (d & 0x0f0f0f0fu) * 0x01010101u + 0x04030201u, o = ((d >> 4) & 0x0f0f0f0fu) * 0x01010101u + 0x04030201u;
      u32 even = e + (o << 8), odd = e + o, total = odd >> 24, before = warp_scan(total) - total;
      if (i < end) {
        uint4 v4 = load_once(values + i);
        u32 v[4] = {v4.x, v4.y, v4.z, v4.w};
        u32 at = line + (load_u16(bases + row * blocks + b) + before - 1) * 2;
#pragma unroll
        for (int j = 0; j < 4; j++) {
          set_shared_u16(at + byte_of(even, j) * 2, (u16)v[j]);
          set_shared_u16(at + byte_of(odd, j) * 2, (u16)(v[j] >> 16));
        }
      }
    }
    barrier_all();
    u16* to = out + (u64)row * columns;
    if (columns % 8 == 0)
      for (int c = thread(); c < columns / 8; c += WARPS * 32) ((uint4*)to)[c] = shared_u128(line + 16 * c);
    else
      for (int c = thread(); c < columns; c += WARPS * 32)
        to[c] = (u16)(shared_u32(line + (2 * c & ~3)) >> (c & 1 ? 16 : 0));
    barrier_all();
  }
}
