// y = x W^T for W [rows, columns] packed as in paired.py, on tensor cores: up to 16 tokens in one pass over the weight.
//
// The A operand of an m16n8k16 product is four registers a lane, a pair of weights in each. Here a register is put together
// from two streams of the lane, one for the low and one for the high halves: a bit says whether the half is zero or the next
// entry of its stream. The 32 low streams lie in the 32 banks of shared memory, one each, and so do the 32 high ones (a
// 32-bit word holds an entry of either kind): whatever bits the lanes have, a read never meets another in its bank.
//
//   block   32 rows x 256 columns, the work of a warp: per lane 256 bits, and two streams of up to 128 entries
//   unit    4 blocks side by side, 32 rows x 1024 columns, consecutive in memory:
//             8 lines of 128 bytes a block   bits: u32 [2][lane][4]
//             1 line a block                 u16 [lane][2]: line * 32 + bank where the low, the high stream begins
//             H lines                        entries: line l, bank b, half h at 128 l + 4 b + 2 h
//   start   int32 [units + 1], in lines; units row group by row group, from left to right
//
// A block of threads takes 32 rows: GROUPS groups of 4 warps, each with every GROUPS-th unit of the rows, and a ring of STAGES
// units in shared memory that the copy engine fills ahead. The sums of all warps meet once, at the end. x is read in place, row by row: the columns of a 32-column piece are dealt out so that a lane needs 8 consecutive ones.
//
// Compile-time: HALF, EARLY (primitives.cuh), TILES of 8 tokens (1, 2), GROUPS, STAGES, BLOCKS a multiprocessor.

#define THREADS (GROUPS * 128)
#define HEADER 36

struct Piece {  // x of 64 columns: [which 32 columns][tokens / 8]
  uint4 v[2][TILES];
};

INLINE void load_x(Piece& piece, const u16* x, int tokens, int columns, int column) {
  int lane = lane_id();
#pragma unroll
  for (int h = 0; h < 2; h++)
#pragma unroll
    for (int n = 0; n < TILES; n++) {
      int token = n * 8 + lane / 4, c = column + 32 * h + 8 * (lane & 3);
      piece.v[h][n] = make_uint4(0, 0, 0, 0);
      if (token < tokens && c < columns) piece.v[h][n] = load_again(x + (u64)token * columns + c);
    }
}

// the 4 registers of a step; bits 2 r (low half) and 2 r + 1 (high half)
INLINE void take_tile(u32* a, u32 bits, u32& low, u32& high) {
  u32 l[4], h[4];
  l[0] = take<0>(bits, low);
  h[0] = take<1>(bits, high);
  l[1] = take<2>(bits, low);
  h[1] = take<3>(bits, high);
  l[2] = take<4>(bits, low);
  h[2] = take<5>(bits, high);
  l[3] = take<6>(bits, low);
  h[3] = take<7>(bits, high);
#pragma unroll
  for (int r = 0; r < 4; r++) a[r] = both_halves(l[r], h[r]);
}

template <int I>
INLINE void step(float (*c)[TILES][4], const u32* bits, const Piece& x, u32& low, u32& high) {
#pragma unroll
  for (int s = 0; s < 2; s++) {
    u32 a[4];
    take_tile(a, bits[s] >> (8 * I), low, high);
#pragma unroll
    for (int n = 0; n < TILES; n++) {
      const uint4& v = x.v[I / 2][n];
      multiply_tile(c[s][n], a, I % 2 ? v.z : v.x, I % 2 ? v.w : v.y);
    }
  }
}

// the ring of a group of 4 warps: start(u) asks for a unit, wait() until the oldest asked for has come
struct Ring {
  u32 slots, barriers, bytes;  // where the slots and their barriers are; bytes of a slot
  const u32* data;
  const int* starts;
  int me, asked, taken;
  INLINE void start(int unit) {
    int slot = asked % STAGES;
    if (!COPY_ENGINE || me == 0) {
      int from = load_int(starts + unit), to = load_int(starts + unit + 1);
      copy_start(slots + slot * bytes, data + (u64)from * 32, (to - from) * 128, barriers + 8 * slot, me, 128);
    }
    asked++;
  }
  template <int AHEAD>
  INLINE u32 wait(int group) {
    int slot = taken % STAGES;
    copy_wait<AHEAD>(barriers + 8 * slot, (taken / STAGES) & 1);
    if (!COPY_ENGINE) barrier_some(group + 1, 128);
    taken++;
    return slots + slot * bytes;
  }
};

KERNEL(THREADS, BLOCKS)
paired_linear(const u16* x, u16* y, const u32* data, const int* starts, const u16* bias, int tokens, int rows, int columns,
              int across, int slot_bytes) {
  int lane = lane_id(), warp = warp_id(), group = warp / 4, block = warp % 4;
  u32 base = shared_base();
  Ring ring;
  ring.barriers = base + group * STAGES * 8;
  ring.slots = base + 128 + group * STAGES * slot_bytes;
  ring.bytes = slot_bytes;
  ring.data = data;
  ring.starts = starts + block_x() * across;
  ring.me = thread() % 128;
  ring.asked = ring.taken = 0;
  if (ring.me == 0) {
#pragma unroll
    for (int i = 0; i < STAGES; i++) copy_barrier_init(ring.barriers + 8 * i);
    copy_barriers_visible();
  }
  // the weights do not depend on the kernel before: fetch the first ones while it may still run
  int next = group;
#pragma unroll
  for (int i = 0; i < STAGES; i++) {
    if (next < across) ring.start(next);
    copy_commit();
    next += GROUPS;
  }
  let_next_kernel_start();
  wait_for_previous_kernel();
  barrier_all();

  float c[2][TILES][4];
#pragma unroll
  for (int s = 0; s < 2; s++)
#pragma unroll
    for (int n = 0; n < TILES; n++)
#pragma unroll
      for (int i = 0; i < 4; i++) c[s][n][i] = 0.f;

  Piece now, ahead;
  int column = (group * 4 + block) * 256;
  load_x(now, x, tokens, columns, column);
  for (int unit = group; unit < across; unit += GROUPS) {
    u32 slot = ring.wait<STAGES - 1>(group);
    u32 begin = shared_u32(slot + (32 + block) * 128 + 4 * lane);
    u32 low = slot + HEADER * 128 + 4 * (begin & 0xffffu), high = slot + HEADER * 128 + 4 * (begin >> 16) + 2;
    u32 bits_at = slot + block * 1024 + 16 * lane;
#pragma unroll 1
    for (int half = 0; half < 2; half++) {
      uint4 w = shared_u128(bits_at + 512 * half);
      u32 bits[4] = {w.x, w.y, w.z, w.w};
#pragma unroll
      for (int q = 0; q < 2; q++) {
        int ahead_column = column + (2 * half + q + 1) * 64;
        if (half == 1 && q == 1) {  // the first piece of the next unit, none after the last
          column += GROUPS * 1024;
          ahead_column = column;
        }
        load_x(ahead, x, tokens, columns, ahead_column);
        step<0>(c, bits + 2 * q, now, low, high);
        step<1>(c, bits + 2 * q, now, low, high);
        step<2>(c, bits + 2 * q, now, low, high);
        step<3>(c, bits + 2 * q, now, low, high);
        now = ahead;
      }
    }
    barrier_some(group + 1, 128);  // all four warps have read the slot
    if (next < across) ring.start(next);
    copy_commit();
    next += GROUPS;
  }

  barrier_all();  // the sums of all warps, added in a fixed order
  u32 sums = base + 128;  // [warps][TILES * 8 tokens][32 rows] float32
#pragma unroll
  for (int s = 0; s < 2; s++)
#pragma unroll
    for (int n = 0; n < TILES; n++)
#pragma unroll
      for (int i = 0; i < 4; i++) {
        int r = 16 * s + 8 * (i / 2) + lane / 4, token = n * 8 + 2 * (lane & 3) + (i & 1);
        set_shared_f32(sums + 4 * ((warp * TILES * 8 + token) * 32 + r), c[s][n][i]);
      }
  barrier_all();
  for (int i = thread(); i < 32 * tokens; i += THREADS) {
    int r = i % 32, token = i / 32, row = block_x() * 32 + r;
    if (row >= rows) continue;
    float sum = bias ? widen(bias[row]) : 0.f;
#pragma unroll
    for (int w = 0; w < GROUPS * 4; w++) sum += shared_f32(sums + 4 * ((w * TILES * 8 + token) * 32 + r));
    y[(u64)token * rows + row] = narrow(sum);
  }
}

// The dense weight back: a block of threads a unit.
KERNEL(128, 4)
paired_unpack(u16* out, const u32* data, const int* starts, int rows, int columns, int across, int slot_bytes) {
  int lane = lane_id(), block = warp_id();
  u32 base = shared_base();
  Ring ring;
  ring.barriers = base;
  ring.slots = base + 128;
  ring.bytes = slot_bytes;
  ring.data = data;
  ring.starts = starts;
  ring.me = thread();
  ring.asked = ring.taken = 0;
  if (ring.me == 0) {
    copy_barrier_init(ring.barriers);
    copy_barriers_visible();
  }
  int unit = block_x();
  ring.start(unit);
  copy_commit();
  barrier_all();
  u32 slot = ring.wait<0>(0);
  u32 begin = shared_u32(slot + (32 + block) * 128 + 4 * lane);
  u32 low = slot + HEADER * 128 + 4 * (begin & 0xffffu), high = slot + HEADER * 128 + 4 * (begin >> 16) + 2;
  int row = (unit / across) * 32 + lane / 4, column = ((unit % across) * 4 + block) * 256 + 8 * (lane & 3);
  for (int half = 0; half < 2; half++) {
    uint4 w = shared_u128(slot + block * 1024 + 16 * lane + 512 * half);
    u32 bits[4] = {w.x, w.y, w.z, w.w};
#pragma unroll
    for (int q = 0; q < 2; q++)
#pragma unroll
      for (int h = 0; h < 2; h++) {
        u32 a[2][2][4];  // [strip][step of the pair][register]
        if (h == 0) {
          take_tile(a[0][0], bits[2 * q], low, high);
          take_tile(a[1][0], bits[2 * q + 1], low, high);
          take_tile(a[0][1], bits[2 * q] >> 8, low, high);
          take_tile(a[1][1], bits[2 * q + 1] >> 8, low, high);
        } else {
          take_tile(a[0][0], bits[2 * q] >> 16, low, high);
          take_tile(a[1][0], bits[2 * q + 1] >> 16, low, high);
          take_tile(a[0][1], bits[2 * q] >> 24, low, high);
          take_tile(a[1][1], bits[2 * q + 1] >> 24, low, high);
        }
        int at = column + (2 * half + q) * 64 + 32 * h;
#pragma unroll
        for (int s = 0; s < 2; s++)
#pragma unroll
          for (int up = 0; up < 2; up++) {
            int r = row + 16 * s + 8 * up;
            u32 v[4] = {a[s][0][up], a[s][0][up + 2], a[s][1][up], a[s][1][up + 2]};
            if (r >= rows) continue;
            u16* to = out + (u64)r * columns + at;
            if (columns % 8 == 0) {
              if (at < columns) *(uint4*)to = make_uint4(v[0], v[1], v[2], v[3]);
            } else {
#pragma unroll
              for (int e = 0; e < 8; e++)
                if (at + e < columns) to[e] = (u16)(v[e / 2] >> (16 * (e & 1)));
            }
          }
      }
  }
}
