// The C interface of the packed linear layer: no Python, no torch, no OpenMP headers; called through ctypes.
//
//     hfs_isa                    what this machine runs: 0 none, 1 AVX2 + FMA + F16C, 2 AVX-512, 3 AVX-512 with bfloat16
//     hfs_amx                    whether it has bfloat16 AMX
//     hfs_linear                 y [tokens, rows] = x [tokens, columns] W^T + bias, W packed (plan.h)
//     hfs_dense                  the same with a dense row-major W, 1 to 8 tokens
//     hfs_unpack                 rows start .. stop-1 of W, dense, bit for bit
//     hfs_pack_masks, _values    dense rows -> masks and counts, then -> values
//     hfs_row_sums               sums of int8 rows
//     hfs_read                   reads memory and does nothing else: the bandwidth to compare with
//
// Every function trusts its arguments: panels.py checks them first. Scratch is allocated per call, so that any number of
// threads may call at once. Returns 0, or -1 when there is no memory.
#include <cpuid.h>
#include <stdlib.h>
#include <sys/mman.h>

#include "plan.h"
#include "threads.h"
//
#include "avx2.h"
#include "avx512.h"

#define EXPORT extern "C" __attribute__((visibility("default")))

static const Paths& paths(int isa) { return isa >= AVX512 ? avx512::PATHS : avx2::PATHS; }

// Asked of the processor, and of the system that has to save the registers; compilers do not agree on a builtin for it.
EXPORT int hfs_isa() {
  uint32_t a, b, c, d, more, registers;
  if (!__get_cpuid_count(1, 0, &a, &b, &c, &d)) return 0;
  constexpr uint32_t FIRST = 1u << 12 | 1u << 23 | 1u << 27 | 1u << 28 | 1u << 29;  // FMA POPCNT OSXSAVE AVX F16C
  if ((c & FIRST) != FIRST) return 0;
  asm volatile("xgetbv" : "=a"(registers) : "c"(0) : "edx");
  if (!__get_cpuid_count(7, 0, &more, &b, &c, &d)) return 0;
  constexpr uint32_t SECOND = 1u << 5 | 1u << 8, YMM = 6, ZMM = 0xe6;  // AVX2 BMI2
  if ((b & SECOND) != SECOND || (registers & YMM) != YMM) return 0;
  constexpr uint32_t B512 = 1u << 16 | 1u << 17 | 1u << 30 | 1u << 31, C512 = 1u << 6 | 1u << 11;  // F DQ BW VL, VBMI2 VNNI
  if ((b & B512) != B512 || (c & C512) != C512 || (registers & ZMM) != ZMM) return AVX2;
  if (more < 1 || !__get_cpuid_count(7, 1, &a, &b, &c, &d)) return AVX512;
  return a & 1u << 5 ? AVX512_BF16 : AVX512;
}

// Tiles of AMX multiply bfloat16 16 times as fast as vdpbf16ps: torch is then better at anything but a few tokens.
EXPORT int hfs_amx() {
  uint32_t a, b, c, d;
  return __get_cpuid_count(7, 0, &a, &b, &c, &d) && (d >> 22 & 1);
}

static int arithmetic_of(const Plan* plan, int x_type) {
  if (plan->type == FLOAT32) return SINGLE;
  if (plan->type == FLOAT16) return HALF;
  if (plan->type == INT8) return BYTES;
  return x_type == BFLOAT16 && plan->isa == AVX512_BF16 ? PAIRS : WIDE;
}

// Panels are cut into parts of about equal bytes. A part should be worth its claim, and more parts than threads even out
// a thread that is held up.
constexpr int64_t PART_BYTES = 48 << 10, PARTS_A_THREAD = 4;

static int64_t bytes_before(const Plan* plan, int64_t panel) {
  return panel * plan->blocks * MASK_BYTES[plan->type] + plan->offsets[panel] * VALUE_BYTES[plan->type];
}
static int64_t cut(const Plan* plan, int64_t part, int64_t parts) {
  if (part >= parts) return plan->panels;
  const int64_t target = (int64_t)((double)bytes_before(plan, plan->panels) * (double)part / (double)parts);
  int64_t low = 0, high = plan->panels;
  while (low < high) {
    int64_t middle = (low + high) / 2;
    if (bytes_before(plan, middle) < target) low = middle + 1;
    else high = middle;
  }
  return low;
}

struct Job {
  const Plan* plan;
  const Paths* paths;
  const uint32_t* x;
  const float* scales;
  uint8_t* y;
  int64_t tokens, chunk, dwords, parts;
  int arithmetic, type;
};

static void multiply_part(void* argument, int64_t part) {
  const Job* job = (const Job*)argument;
  const Plan* plan = job->plan;
  const int64_t row = plan->rows * (job->type == FLOAT32 ? 4 : 2);
  alignas(64) uint32_t sums[MAX_TOKENS * ROWS];
  for (int64_t panel = cut(plan, part, job->parts), end = cut(plan, part + 1, job->parts); panel < end; panel++) {
    const uint8_t* masks = plan->masks + panel * plan->blocks * MASK_BYTES[plan->type];
    const uint8_t* values = plan->values + plan->offsets[panel] * VALUE_BYTES[plan->type];
    for (int64_t at = 0; at < job->tokens; at += job->chunk) {
      const int n = (int)(job->tokens - at < job->chunk ? job->tokens - at : job->chunk);
      job->paths->times[job->arithmetic][n - 1](masks, values, job->x + at * job->dwords, plan->blocks, sums);
      job->paths->finish(plan, sums, job->scales + at, panel, n, job->type, job->y + at * row);
    }
  }
}

// Rearranged activations stay in the second or third level of the cache while all panels go by.
constexpr int64_t STAGED_BYTES = 2 << 20;

EXPORT int hfs_linear(const Plan* plan, const uint8_t* x, uint8_t* y, int64_t tokens, int type, int threads) {
  if (tokens == 0 || plan->rows == 0) return 0;
  const Paths& p = paths(plan->isa);
  const int arithmetic = arithmetic_of(plan, type);
  const int64_t dwords = plan->blocks * (arithmetic == WIDE || arithmetic == HALF ? 2 : 1), width = type == FLOAT32 ? 4 : 2;
  const int64_t most = p.max_tokens[arithmetic], chunks = (tokens + most - 1) / most;
  const int64_t chunk = (tokens + chunks - 1) / chunks;  // equal chunks: 17 tokens are 9 and 8
  int64_t together = dwords ? STAGED_BYTES / (dwords * 4 * chunk) * chunk : tokens;
  together = together < chunk ? chunk : together < tokens ? together : tokens;

  Job job = {plan, &p, (const uint32_t*)x, nullptr, y, tokens, chunk, dwords, 1, arithmetic, type};
  if (threads > 1) {
    job.parts = bytes_before(plan, plan->panels) / PART_BYTES + 1;
    if (job.parts > threads * PARTS_A_THREAD) job.parts = threads * PARTS_A_THREAD;
    if (job.parts > plan->panels) job.parts = plan->panels;
  }
  if (tokens == 1 && plan->columns * width == dwords * 4 && (type == FLOAT32 ? arithmetic != BYTES : arithmetic == PAIRS)) {
    in_parallel(multiply_part, &job, job.parts, threads);  // x is as it should be already
    return 0;
  }
  // x in the order of the blocks, then scales, then one chunk not yet interleaved
  alignas(64) uint8_t small[16384];
  uint8_t* scratch = small;
  const size_t staged = (size_t)together * dwords * 4, total = staged + together * 4 + (chunk > 1 ? chunk * dwords * 4 : 0);
  if (total > sizeof small && !(scratch = (uint8_t*)malloc(total))) return -1;
  float* scales = (float*)(scratch + staged);
  uint32_t* rows = (uint32_t*)(scales + together);
  job.x = (uint32_t*)scratch;
  job.scales = scales;
  for (int64_t start = 0; start < tokens; start += together) {
    job.tokens = tokens - start < together ? tokens - start : together;
    job.y = y + start * plan->rows * width;
    for (int64_t at = 0; at < job.tokens; at += chunk) {
      const int n = (int)(job.tokens - at < chunk ? job.tokens - at : chunk);
      uint32_t* to = (uint32_t*)scratch + at * dwords;
      for (int b = 0; b < n; b++)
        scales[at + b] = p.convert(x + (start + at + b) * plan->columns * width, type, plan->columns, arithmetic, dwords,
                                   n == 1 ? to : rows + b * dwords);
      if (n > 1) p.interleave(rows, dwords, n, to);
    }
    in_parallel(multiply_part, &job, job.parts, threads);
  }
  if (scratch != small) free(scratch);
  return 0;
}

EXPORT int hfs_row_sums(const Plan* plan, int32_t* sums) {
  uint32_t* ones = (uint32_t*)malloc(plan->blocks * 4 + 1);
  if (!ones) return -1;
  memset(ones, 1, plan->blocks * 4);
  for (int64_t panel = 0; panel < plan->panels; panel++) {
    uint32_t out[ROWS];
    paths(plan->isa).times[BYTES][0](plan->masks + panel * plan->blocks * 8, plan->values + plan->offsets[panel], ones,
                                     plan->blocks, out);
    const int64_t left = plan->rows - panel * ROWS;
    memcpy(sums + panel * ROWS, out, (left < ROWS ? left : ROWS) * 4);
  }
  free(ones);
  return 0;
}

struct UnpackJob {
  const Plan* plan;
  int64_t start, stop;
  uint8_t* out;
};
static void unpack_part(void* argument, int64_t part) {
  const UnpackJob* job = (const UnpackJob*)argument;
  paths(job->plan->isa).unpack(job->plan, job->start / ROWS + part, job->start, job->stop, job->out);
}
EXPORT int hfs_unpack(const Plan* plan, int64_t start, int64_t stop, uint8_t* out, int threads) {
  if (start >= stop) return 0;
  UnpackJob job = {plan, start, stop, out};
  in_parallel(unpack_part, &job, (stop - 1) / ROWS - start / ROWS + 1, threads);
  return 0;
}

struct PackJob {
  const Paths* paths;
  const uint8_t* weight;
  uint8_t* out;
  int64_t* counts;
  const int64_t* offsets;
  int64_t rows, columns, blocks;
  int type;
};
static void pack_part(void* argument, int64_t panel) {
  const PackJob* job = (const PackJob*)argument;
  const int64_t left = job->rows - panel * ROWS, rows = left < ROWS ? left : ROWS, bytes = VALUE_BYTES[job->type];
  const uint8_t* weight = job->weight + panel * ROWS * job->columns * bytes;
  if (job->counts)
    job->counts[panel] = job->paths->masks(job->type, weight, rows, job->columns, job->blocks,
                                           job->out + panel * job->blocks * MASK_BYTES[job->type]);
  else
    job->paths->values(job->type, weight, rows, job->columns, job->blocks, job->out + job->offsets[panel] * bytes);
}
EXPORT int hfs_pack_masks(int isa, int type, const uint8_t* weight, int64_t rows, int64_t columns, int64_t blocks,
                          uint8_t* masks, int64_t* counts, int threads) {
  PackJob job = {&paths(isa), weight, masks, counts, nullptr, rows, columns, blocks, type};
  in_parallel(pack_part, &job, (rows + ROWS - 1) / ROWS, threads);
  return 0;
}
// offsets[panel] is where the panel begins, counted in values from `values`.
EXPORT int hfs_pack_values(int isa, int type, const uint8_t* weight, int64_t rows, int64_t columns, int64_t blocks,
                           const int64_t* offsets, uint8_t* values, int threads) {
  PackJob job = {&paths(isa), weight, values, nullptr, offsets, rows, columns, blocks, type};
  in_parallel(pack_part, &job, (rows + ROWS - 1) / ROWS, threads);
  return 0;
}

struct DenseJob {
  const Plan* plan;  // masks is W; values, offsets, scales, sums are unused
  const Paths* paths;
  const uint32_t* x;
  uint8_t* y;
  int64_t dwords, parts;
  int tokens;
};
static void dense_part(void* argument, int64_t part) {
  const DenseJob* job = (const DenseJob*)argument;
  const Plan* plan = job->plan;
  const int64_t groups = (plan->rows + ROWS - 1) / ROWS, row_bytes = plan->columns * VALUE_BYTES[plan->type];
  alignas(64) float sums[MAX_TOKENS * ROWS];
  for (int64_t group = groups * part / job->parts; group < groups * (part + 1) / job->parts; group++) {
    const int64_t left = plan->rows - group * ROWS;
    job->paths->dense(plan->masks + group * ROWS * row_bytes, plan->type, left < ROWS ? left : ROWS, plan->columns, job->x,
                      job->dwords, job->tokens, sums);
    job->paths->finish(plan, (const uint32_t*)sums, nullptr, group, job->tokens, plan->type, job->y);
  }
}
EXPORT int hfs_dense(const Plan* plan, const uint8_t* x, uint8_t* y, int64_t tokens, int threads) {
  if (tokens == 0 || plan->rows == 0) return 0;
  const int isa = plan->type == BFLOAT16 && plan->isa == AVX512 ? AVX2 : plan->isa;
  const Paths& p = paths(isa);
  const int64_t row_bytes = plan->columns * VALUE_BYTES[plan->type];
  const int arithmetic = plan->type == FLOAT32 ? SINGLE : isa == AVX512_BF16 ? PAIRS : WIDE;
  const int64_t dwords = ((arithmetic == PAIRS ? plan->columns + 1 : plan->columns * 2) / 2 + 15) / 16 * 16;
  alignas(64) uint8_t small[16384];
  uint8_t* scratch = small;
  DenseJob job = {plan, &p, (const uint32_t*)x, y, dwords, 1, (int)tokens};
  if (arithmetic == WIDE || row_bytes != dwords * 4) {
    const size_t total = (size_t)tokens * dwords * 4;
    if (total > sizeof small && !(scratch = (uint8_t*)malloc(total))) return -1;
    for (int64_t b = 0; b < tokens; b++)
      p.convert(x + b * row_bytes, plan->type, plan->columns, arithmetic, dwords, (uint32_t*)scratch + b * dwords);
    job.x = (uint32_t*)scratch;
  }
  const int64_t groups = (plan->rows + ROWS - 1) / ROWS;
  job.parts = threads <= 1 ? 1 : plan->rows * row_bytes / PART_BYTES + 1;
  if (job.parts > threads * PARTS_A_THREAD) job.parts = threads * PARTS_A_THREAD;
  if (job.parts > groups) job.parts = groups;
  in_parallel(dense_part, &job, job.parts, threads);
  if (scratch != small) free(scratch);
  return 0;
}

// Huge pages for memory that is read from end to end for every token: 10 to 20% faster. `now` moves what is there already
// (Linux 6.1 and later); else it is a wish for pages not yet touched. Nothing happens where the system says never.
EXPORT void hfs_huge_pages(uint8_t* from, int64_t bytes, int now) {
  const uintptr_t huge = 2 << 20, start = ((uintptr_t)from + huge - 1) & -huge, end = ((uintptr_t)from + bytes) & -huge;
  if (start >= end || madvise((void*)start, end - start, MADV_HUGEPAGE)) return;
  if (now) madvise((void*)start, end - start, 25 /* MADV_COLLAPSE */);
}

struct ReadJob {
  const uint8_t* from;
  int64_t bytes, parts, seen;
};
static void read_part(void* argument, int64_t part) {
  ReadJob* job = (ReadJob*)argument;
  int64_t start = job->bytes / 64 * part / job->parts * 64, end = job->bytes / 64 * (part + 1) / job->parts * 64;
  __m128i seen[4] = {};
  for (int64_t at = start; at < end; at += 64) {
    _mm_prefetch((const char*)job->from + at + 2048, _MM_HINT_T0);
    UNROLL for (int u = 0; u < 4; u++) seen[u] = _mm_xor_si128(seen[u], _mm_loadu_si128((const __m128i*)(job->from + at + 16 * u)));
  }
  seen[0] = _mm_xor_si128(_mm_xor_si128(seen[0], seen[1]), _mm_xor_si128(seen[2], seen[3]));
  __atomic_fetch_add(&job->seen, _mm_cvtsi128_si64(seen[0]), __ATOMIC_RELAXED);
}
EXPORT int64_t hfs_read(const uint8_t* from, int64_t bytes, int threads) {
  ReadJob job = {from, bytes, threads > 1 ? threads * PARTS_A_THREAD : 1, 0};
  in_parallel(read_part, &job, job.parts, threads);
  return job.seen;
}
