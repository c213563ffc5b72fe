// One copy of the code for each instruction set, chosen at run time, and work cut into pieces for threads.

#pragma once

#include <atomic>
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

// Elements; divides 2^32, and whole blocks of gradients.cpp. Of an update 1.7 MB, a fraction of a millisecond.
constexpr int64_t kPiece = int64_t{1} << 16;

// Calls body(begin, count) once for each piece of [0, count). Pieces end where `offset` + element is a multiple
// of kPiece, so that none crosses a multiple of 2^32. A thread takes the next piece when it is done with one:
// whichever a busy core slows, the others do not wait for its share.
template <class Body>
void for_pieces(int64_t count, uint64_t offset, int32_t threads, const Body& body) {
  const int64_t before = int64_t(offset % uint64_t(kPiece));  // elements of the first piece that are not ours
  const int64_t pieces = count > 0 ? (before + count + kPiece - 1) / kPiece : 0;
  std::atomic<int64_t> next{0};
#ifdef _OPENMP
#pragma omp parallel num_threads(pieces > 1 ? threads : 1)
#endif
  {
    const IeeeMode mode;
    for (int64_t i = next.fetch_add(1); i < pieces; i = next.fetch_add(1)) {
      const int64_t start = i * kPiece - before, end = start + kPiece;
      const int64_t begin = start > 0 ? start : 0;
      body(begin, int32_t((end < count ? end : count) - begin));
    }
    (void)mode;
  }
  (void)threads;
}

}  // namespace
