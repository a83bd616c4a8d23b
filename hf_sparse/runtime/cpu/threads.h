// Parallel regions on the OpenMP threads that torch already has.
//
// libgomp's entry point is looked up in the process at run time (torch loads its own copy into the global scope; LLVM's
// and Intel's libraries export the same name), so nothing is linked and no second pool of threads appears. Without it the
// work is done by the calling thread. Parts are claimed one after the other, so that fewer threads than asked for, or one
// that is held up, cost time and never results.
//
// After fork() the pool's threads do not exist in the child and libgomp would wait for them for ever: a child computes on
// one thread.
#pragma once
#include <dlfcn.h>
#include <pthread.h>
#include <stdint.h>

typedef void (*GompParallel)(void (*)(void*), void*, unsigned, unsigned);
static int forked_child = 0;
static void note_fork() { forked_child = 1; }
__attribute__((constructor)) static void watch_forks() { pthread_atfork(nullptr, nullptr, note_fork); }

static GompParallel gomp() {  // looked up once; a race would find the same address twice
  static GompParallel found = nullptr;
  GompParallel now = __atomic_load_n(&found, __ATOMIC_RELAXED);
  if (!now) __atomic_store_n(&found, now = (GompParallel)dlsym(RTLD_DEFAULT, "GOMP_parallel"), __ATOMIC_RELAXED);
  return now;
}

struct Team {
  void (*work)(void* job, int64_t part);
  void* job;
  int64_t parts, next;
};

static void member(void* argument) {
  Team* team = (Team*)argument;
  for (;;) {
    int64_t part = __atomic_fetch_add(&team->next, 1, __ATOMIC_RELAXED);
    if (part >= team->parts) return;
    team->work(team->job, part);
  }
}

// work(job, 0 .. parts-1), each exactly once, on up to `threads` threads; returns when all are done.
static void in_parallel(void (*work)(void*, int64_t), void* job, int64_t parts, int threads) {
  Team team = {work, job, parts, 0};
  if (threads > parts) threads = (int)parts;
  if (threads > 1 && !forked_child && gomp())
    gomp()(member, &team, (unsigned)threads, 0);
  else
    member(&team);
}
