// One copy of the code for each instruction set, chosen at run time, and work cut over threads.

#pragma once

#include <cstdint>

#ifdef _OPENMP
#include <omp.h>
#endif

#include "element.h"

namespace {

enum Dtype : int32_t { kFloat32, kBFloat16 };
enum Isa : int32_t { kAuto, kPlain, kBaseline, kAvx2, kAvx512 };

// Expands MAKE(name of the variant, function attribute) for each instruction set.
#if !defined(__x86_64__)
#define FOR_EACH_ISA(MAKE) MAKE(Baseline, )
#elif defined(__clang__)
#define FOR_EACH_ISA(MAKE)                       \
  MAKE(Baseline, )                               \
  MAKE(Avx2, __attribute__((target("avx2"))))    \
  MAKE(Avx512, __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl"), min_vector_width(512))))
#else
#define FOR_EACH_ISA(MAKE)                       \
  MAKE(Baseline, )                               \
  MAKE(Avx2, __attribute__((target("avx2"))))    \
  MAKE(Avx512, __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,prefer-vector-width=512"))))
#endif

bool available(int32_t isa) {
  switch (isa) {
    case kAuto:
    case kPlain:
    case kBaseline: return true;
#if defined(__x86_64__)
    case kAvx2: return __builtin_cpu_supports("avx2");
    case kAvx512:
      return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
             __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
#endif
    default: return false;
  }
}

int32_t resolve(int32_t isa) {
  if (isa != kAuto) return isa;
  return available(kAvx512) ? kAvx512 : available(kAvx2) ? kAvx2 : kBaseline;
}

constexpr int64_t kPiece = int64_t{1} << 20;  // elements; divides 2^32
constexpr int64_t kCacheLine = 64;            // elements of any type: whole cache lines

// Calls body(begin, count) for each piece of [0, count), split once over the threads. Pieces end where
// `offset` + element is a multiple of kPiece, so that none crosses a multiple of 2^32. A thread's share
// begins at a multiple of `grain`.
template <class Body>
void for_pieces(int64_t count, uint64_t offset, int32_t threads, int64_t grain, const Body& body) {
#ifdef _OPENMP
#pragma omp parallel num_threads(threads)
#endif
  {
    int64_t thread = 0, team = 1;
#ifdef _OPENMP
    thread = omp_get_thread_num();
    team = omp_get_num_threads();
#endif
    const IeeeMode mode;
    const int64_t blocks = (count + grain - 1) / grain;
    int64_t begin = blocks * thread / team * grain;
    int64_t end = blocks * (thread + 1) / team * grain;
    if (end > count) end = count;
    while (begin < end) {
      int64_t size = kPiece - int64_t((offset + uint64_t(begin)) % uint64_t(kPiece));
      if (size > end - begin) size = end - begin;
      body(begin, int32_t(size));
      begin += size;
    }
    (void)mode;
  }
  (void)threads;
}

}  // namespace
