// The instructions of primitives.cuh in plain C++, so that the kernels' own source runs on a CPU, thread by thread.
//
// Every CUDA thread is a fiber with its own stack; they take turns only where a kernel makes threads meet (shuffles, barriers,
// tensor-core products), so a barrier that some thread never reaches is a deadlock that is noticed. Global pointers are
// ordinary ones: built with -fsanitize=address, any read or write beyond an allocation stops the program.

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <ucontext.h>
#include <vector>

typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;
struct uint2 { u32 x, y; };
struct uint4 { u32 x, y, z, w; };
inline uint4 make_uint4(u32 x, u32 y, u32 z, u32 w) { return {x, y, z, w}; }
#define KERNEL(threads, blocks) void
#define INLINE inline
using std::min;

struct Thread { int id; bool done; ucontext_t context; std::vector<char> stack; };
struct Block { int bx, by, gx, gy, threads; } blk;
static std::vector<Thread> fibers;
static ucontext_t scheduler;
static int current;
static std::vector<unsigned char> shared_bytes;
static void rest() {
  int mine = current;
  swapcontext(&fibers[mine].context, &scheduler);
  current = mine;
}
struct Meeting { int count = 0; u64 phase = 0; };
static Meeting all_meeting, some_meeting[16], warp_meeting[64];
static u64 board[64][32][8];
static int stuck;
static void meet(Meeting& m, int n) {
  stuck = 0;
  u64 phase = m.phase;
  if (++m.count == n) { m.count = 0; m.phase++; }
  while (m.phase == phase) {
    if (++stuck > 2000000) { fprintf(stderr, "deadlock: threads wait for others that never come\n"); abort(); }
    rest();
  }
}
static void meet_warp() { meet(warp_meeting[current / 32], 32); }

inline u32 shared_base() { return 0; }
inline int thread() { return current; }
inline int lane_id() { return current & 31; }
inline int warp_id() { return current >> 5; }
inline int block_x() { return blk.bx; }
inline int block_y() { return blk.by; }
inline int grid_x() { return blk.gx; }
template <class T> T& at_shared(u32 a, u32 size = sizeof(T)) {
  if (a % size || a + size > shared_bytes.size()) {
    fprintf(stderr, "shared memory: %u bytes at %u of %zu\n", size, a, shared_bytes.size());
    abort();
  }
  return *(T*)(shared_bytes.data() + a);
}
inline float as_float(u32 b) { float f; memcpy(&f, &b, 4); return f; }
inline u32 __float_as_uint(float f) { u32 b; memcpy(&b, &f, 4); return b; }
#if HALF
inline float widen(u16 bits) { _Float16 h; memcpy(&h, &bits, 2); return (float)h; }
inline u16 narrow(float f) { _Float16 h = (_Float16)f; u16 b; memcpy(&b, &h, 2); return b; }
#else
inline float widen(u16 bits) { return as_float((u32)bits << 16); }
inline u16 narrow(float f) {
  u32 b = __float_as_uint(f);
  if ((b & 0x7fffffff) > 0x7f800000) return 0x7fff;
  return (u16)((b + 0x7fff + (b >> 16 & 1)) >> 16);
}
#endif
inline float widen_low(u32 w) { return widen((u16)w); }
inline float widen_high(u32 w) { return widen((u16)(w >> 16)); }
inline u32 byte_of(u32 w, int j) { return w >> (8 * j) & 255; }
inline u32 __byte_perm(u32 x, u32 y, u32 s) {
  u64 both = (u64)y << 32 | x;
  u32 out = 0;
  for (int i = 0; i < 4; i++) out |= (u32)(both >> (8 * (s >> (4 * i) & 7)) & 255) << (8 * i);
  return out;
}
inline uint4 load_once(const uint4* p) { return *p; }
inline u32 load_once(const u32* p) { return *p; }
inline u32 load_u16(const u16* p) { return *p; }
inline int load_int(const int* p) { return *p; }
inline uint4 load_again(const u16* p) {
  if ((uintptr_t)p % 16) { fprintf(stderr, "16 bytes read from an odd address\n"); abort(); }
  return *(const uint4*)p;
}
inline float shared_f32(u32 a) { return at_shared<float>(a); }
inline u32 shared_u32(u32 a) { return at_shared<u32>(a); }
inline uint2 shared_u64(u32 a) { return at_shared<uint2>(a, 8); }
inline uint4 shared_u128(u32 a) { return at_shared<uint4>(a, 16); }
inline void set_shared_f32(u32 a, float v) { at_shared<float>(a) = v; }
inline void set_shared_u32(u32 a, u32 v) { at_shared<u32>(a) = v; }
inline void set_shared_u16(u32 a, u16 v) { at_shared<u16>(a) = v; }
inline void set_shared_u128(u32 a, u32 x, u32 y, u32 z, u32 w) { at_shared<uint4>(a, 16) = {x, y, z, w}; }
inline float warp_sum(float v) {
  for (int d = 16; d; d >>= 1) {
    board[current / 32][current % 32][0] = __float_as_uint(v);
    meet_warp();
    float other = as_float((u32)board[current / 32][current % 32 ^ d][0]);
    meet_warp();
    v += other;
  }
  return v;
}
inline u32 warp_scan(u32 v) {
  board[current / 32][current % 32][0] = v;
  meet_warp();
  u32 sum = 0;
  for (int l = 0; l <= current % 32; l++) sum += (u32)board[current / 32][l][0];
  meet_warp();
  return sum;
}
inline void barrier_all() { meet(all_meeting, blk.threads); }
inline void barrier_some(int id, int n) { meet(some_meeting[id], n); }
inline void wait_for_previous_kernel() {}
inline void let_next_kernel_start() {}
inline void multiply_tile(float* c, const u32* a, u32 b0, u32 b1) {
  u64* mine = board[current / 32][current % 32];
  for (int i = 0; i < 4; i++) mine[i] = a[i];
  mine[4] = b0, mine[5] = b1;
  meet_warp();
  auto& w = board[current / 32];
  int g = current % 32 / 4, t = current % 4;
  for (int i = 0; i < 4; i++) {
    int row = g, up = i / 2, col = 2 * t + i % 2;
    for (int k = 0; k < 16; k++) {
      int kk = k % 8, from = kk / 2, r = up + 2 * (k / 8);
      u32 av = (u32)w[row * 4 + from][r], bv = (u32)w[col * 4 + from][4 + k / 8];
      c[i] += (kk & 1 ? widen_high(av) : widen_low(av)) * (kk & 1 ? widen_high(bv) : widen_low(bv));
    }
  }
  meet_warp();
}
template <int K> u32 take(u32 bits, u32& at) {
  if (!(bits >> K & 1)) return 0;
  at += 128;
  return at_shared<u16>(at - 128);
}
inline u32 both_halves(u32 low, u32 high) { return low | high << 16; }
#ifndef COPY_ENGINE
#define COPY_ENGINE 1
#endif
inline void copy_barrier_init(u32 barrier) { at_shared<u64>(barrier) = 0; }
inline void copy_barriers_visible() {}
inline void copy_start(u32 to, const void* from, u32 bytes, u32 barrier, int me, int threads) {
  if ((uintptr_t)from % 16 || to % 16 || bytes % 16 || to + bytes > shared_bytes.size()) {
    fprintf(stderr, "a copy of %u bytes to %u of %zu\n", bytes, to, shared_bytes.size());
    abort();
  }
  if (COPY_ENGINE) {
    memcpy(&shared_bytes[to], from, bytes);
    at_shared<u64>(barrier)++;
  } else {
    for (u32 i = me * 16; i < bytes; i += threads * 16) memcpy(&shared_bytes[to + i], (const char*)from + i, 16);
  }
}
inline void copy_commit() {}
template <int AHEAD> void copy_wait(u32 barrier, u32 phase) {
  if (!COPY_ENGINE) return;
  stuck = 0;
  while ((at_shared<u64>(barrier) & 1) == phase) {  // as the hardware: true once the phase of this parity is complete
    if (++stuck > 2000000) { fprintf(stderr, "deadlock: a copy never comes\n"); abort(); }
    rest();
  }
}

static std::function<void()> body;
static void enter() {
  body();
  fibers[current].done = true;
  while (true) rest();
}
static void launch(int gx, int gy, int threads, u32 shared, std::function<void()> kernel) {
  body = kernel;
  for (int by = 0; by < gy; by++)
    for (int bx = 0; bx < gx; bx++) {
      blk = {bx, by, gx, gy, threads};
      shared_bytes.assign(shared, 0xff);  // NaN until written
      fibers.resize(threads);
      all_meeting = {};
      for (auto& m : some_meeting) m = {};
      for (auto& m : warp_meeting) m = {};
      for (int i = 0; i < threads; i++) {
        Thread& f = fibers[i];
        f.id = i, f.done = false;
        f.stack.resize(48 << 10);
        getcontext(&f.context);
        f.context.uc_stack.ss_sp = f.stack.data();
        f.context.uc_stack.ss_size = f.stack.size();
        f.context.uc_link = &scheduler;
        makecontext(&f.context, enter, 0);
      }
      for (int left = threads; left;) {
        left = 0;
        for (int i = 0; i < threads; i++)
          if (!fibers[i].done) {
            current = i;
            swapcontext(&scheduler, &fibers[i].context);
            left += !fibers[i].done;
          }
      }
    }
}
