// The few machine instructions that the kernels are made of, each under a name.
//
// Weights and activations travel as raw 16-bit patterns (u16), two to a 32-bit word: no CUDA header is needed. HALF is 0 for
// bfloat16 and 1 for float16. Shared memory is addressed by 32-bit byte addresses (the "shared window"), which is what the
// instructions take, so that no address is ever 64 bits wide in an inner loop.

typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;

#define KERNEL(threads, blocks) extern "C" __global__ void __launch_bounds__(threads, blocks)
#define INLINE __device__ __forceinline__
extern __shared__ __align__(128) unsigned char shared_memory[];

// ---- where am I
INLINE u32 shared_base() { return (u32)__cvta_generic_to_shared(shared_memory); }
INLINE int thread() { return threadIdx.x; }
INLINE int lane_id() { return threadIdx.x & 31; }
INLINE int warp_id() { return __shfl_sync(~0u, threadIdx.x >> 5, 0); }  // one value a warp: kept in a uniform register
INLINE int block_x() { return blockIdx.x; }
INLINE int block_y() { return blockIdx.y; }
INLINE int grid_x() { return gridDim.x; }

// ---- numbers
INLINE float as_float(u32 bits) { return __uint_as_float(bits); }
#if HALF
INLINE float widen(u16 bits) { float f; asm("cvt.f32.f16 %0, %1;" : "=f"(f) : "h"(bits)); return f; }
INLINE float widen_low(u32 word) { return widen((u16)word); }
INLINE float widen_high(u32 word) { return widen((u16)(word >> 16)); }
INLINE u16 narrow(float f) { u16 h; asm("cvt.rn.f16.f32 %0, %1;" : "=h"(h) : "f"(f)); return h; }
#else
INLINE float widen(u16 bits) { return as_float((u32)bits << 16); }
INLINE float widen_low(u32 word) { return as_float(word << 16); }
INLINE float widen_high(u32 word) { return as_float(word & 0xffff0000u); }
INLINE u16 narrow(float f) { u16 h; asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(h) : "f"(f)); return h; }
#endif
INLINE u32 byte_of(u32 word, int j) { return __byte_perm(word, 0, 0x4440 + j); }

// ---- global memory: read once (weights), or again and again (activations)
INLINE uint4 load_once(const uint4* p) {
  uint4 v;
  asm volatile("ld.global.nc.L1::no_allocate.L2::256B.v4.u32 {%0,%1,%2,%3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "l"(p));
  return v;
}
INLINE u32 load_once(const u32* p) {
  u32 v;
  asm volatile("ld.global.nc.L1::no_allocate.L2::128B.u32 %0, [%1];" : "=r"(v) : "l"(p));
  return v;
}
INLINE u32 load_u16(const u16* p) {
  u16 v;
  asm volatile("ld.global.nc.u16 %0, [%1];" : "=h"(v) : "l"(p));
  return v;
}
INLINE int load_int(const int* p) {
  int v;
  asm volatile("ld.global.nc.u32 %0, [%1];" : "=r"(v) : "l"(p));
  return v;
}
INLINE uint4 load_again(const u16* p) {  // activations: written by the kernel before, so never through the read-only path
  uint4 v;
  asm volatile("ld.global.v4.u32 {%0,%1,%2,%3}, [%4];" : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "l"(p));
  return v;
}

// ---- shared memory
INLINE float shared_f32(u32 a) { float v; asm volatile("ld.shared.f32 %0, [%1];" : "=f"(v) : "r"(a)); return v; }
INLINE u32 shared_u32(u32 a) { u32 v; asm volatile("ld.shared.u32 %0, [%1];" : "=r"(v) : "r"(a)); return v; }
INLINE uint2 shared_u64(u32 a) {
  uint2 v;
  asm volatile("ld.shared.v2.u32 {%0,%1}, [%2];" : "=r"(v.x), "=r"(v.y) : "r"(a));
  return v;
}
INLINE uint4 shared_u128(u32 a) {
  uint4 v;
  asm volatile("ld.shared.v4.u32 {%0,%1,%2,%3}, [%4];" : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "r"(a));
  return v;
}
INLINE void set_shared_f32(u32 a, float v) { asm volatile("st.shared.f32 [%0], %1;" ::"r"(a), "f"(v) : "memory"); }
INLINE void set_shared_u32(u32 a, u32 v) { asm volatile("st.shared.u32 [%0], %1;" ::"r"(a), "r"(v) : "memory"); }
INLINE void set_shared_u16(u32 a, u16 v) { asm volatile("st.shared.u16 [%0], %1;" ::"r"(a), "h"(v) : "memory"); }
INLINE void set_shared_u128(u32 a, u32 x, u32 y, u32 z, u32 w) {
  asm volatile("st.shared.v4.u32 [%0], {%1,%2,%3,%4};" ::"r"(a), "r"(x), "r"(y), "r"(z), "r"(w) : "memory");
}

// ---- within a warp
INLINE float warp_sum(float v) {
#pragma unroll
  for (int d = 16; d; d >>= 1) v += __shfl_xor_sync(~0u, v, d);
  return v;
}
INLINE u32 warp_scan(u32 v) {  // inclusive; two instructions a step
#pragma unroll
  for (int d = 1; d < 32; d <<= 1)
    asm volatile(
        "{ .reg .u32 r; .reg .pred p; shfl.sync.up.b32 r|p, %0, %1, 0, 0xffffffff; @p add.u32 %0, %0, r; }"
        : "+r"(v) : "r"(d));
  return v;
}

// ---- barriers
INLINE void barrier_all() { __syncthreads(); }
INLINE void barrier_some(int id, int threads) { asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory"); }

// ---- programmatic dependent launch: this kernel may start before the one ahead of it has finished
INLINE void wait_for_previous_kernel() {
#if EARLY && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}
INLINE void let_next_kernel_start() {
#if EARLY && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

// ---- tensor cores: c[16 rows, 8 tokens] += a[16 rows, 16 columns] b[16 columns, 8 tokens]
INLINE void multiply_tile(float* c, const u32* a, u32 b0, u32 b1) {
#if HALF
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
#else
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
#endif
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// ---- the next entry of a stream in shared memory, if bit K (0..7) of `bits` is set, else 0; the stream moves on by a line of
// 128 bytes. The new address is a multiple of the bit itself and goes to a new register: an instruction that overwrote the old
// one would have to wait until the load has read it.
template <int K>
INLINE u32 take(u32 bits, u32& at) {
  u32 bit = bits & (1u << K), value = 0;
  asm volatile("{ .reg .pred p; setp.ne.u32 p, %1, 0; @p ld.shared.u16 %0, [%2]; }" : "+r"(value) : "r"(bit), "r"(at));
  asm("mad.lo.u32 %0, %1, %2, %3;" : "=r"(at) : "r"(bit), "n"(128 >> K), "r"(at));
  return value;
}
INLINE u32 both_halves(u32 low, u32 high) { return __byte_perm(low, high, 0x5410); }

// ---- asynchronous copies of `bytes` (a multiple of 16) from global to shared memory
#if __CUDA_ARCH__ >= 900  // one thread asks the copy engine; a barrier in shared memory counts the bytes that have come
#define COPY_ENGINE 1
INLINE void copy_barrier_init(u32 barrier) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"(barrier) : "memory");
}
INLINE void copy_barriers_visible() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }
INLINE void copy_start(u32 to, const void* from, u32 bytes, u32 barrier, int, int) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
  asm volatile(
      "{ .reg .b64 policy; createpolicy.fractional.L2::evict_first.b64 policy, 1.0;\n"
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint [%0], [%1], %2, [%3], policy; }" ::"r"(to),
      "l"(from), "r"(bytes), "r"(barrier)
      : "memory");
}
INLINE void copy_commit() {}
template <int AHEAD>
INLINE void copy_wait(u32 barrier, u32 phase) {
  asm volatile(
      "{ .reg .pred done; again: mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1, 0x989680;\n"
      "@!done bra again; }" ::"r"(barrier), "r"(phase)
      : "memory");
}
#else  // every thread copies its share; waiting is for all groups of copies but the AHEAD newest, and for one's own only
#define COPY_ENGINE 0
INLINE void copy_barrier_init(u32) {}
INLINE void copy_barriers_visible() {}
INLINE void copy_start(u32 to, const void* from, u32 bytes, u32, int me, int threads) {
  for (u32 i = me * 16; i < bytes; i += threads * 16)
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(to + i), "l"((const char*)from + i) : "memory");
}
INLINE void copy_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int AHEAD>
INLINE void copy_wait(u32, u32) { asm volatile("cp.async.wait_group %0;" ::"n"(AHEAD) : "memory"); }
#endif
