// One element of the update: bit patterns, rounding, random numbers, and the floating-point mode.

#pragma once

#include <cstdint>
#include <cstring>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#ifdef __FAST_MATH__
#error "compile without -ffast-math: the bits must not depend on the compiler"
#endif

#define ALWAYS_INLINE inline __attribute__((always_inline))

namespace {

using bf16 = uint16_t;  // the upper half of an fp32

ALWAYS_INLINE float as_float(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

ALWAYS_INLINE uint32_t as_bits(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
}

ALWAYS_INLINE float widen(float value) { return value; }
ALWAYS_INLINE float widen(bf16 value) { return as_float(uint32_t(value) << 16); }

// Every NaN is stored as this one: which of two NaNs an operation passes on is up to the compiler.
constexpr uint32_t kNan = 0x7FC00000u;

ALWAYS_INLINE uint32_t canonical_bits(float value) {
  const uint32_t bits = as_bits(value);
  return int32_t(bits & 0x7FFFFFFFu) > 0x7F800000 ? kNan : bits;
}

// A moment below 2^-126 is stored as zero. Without gradients (rows of an embedding that no batch visits)
// moments decay until they stay denormal for good, and denormal operands cost Intel cores a hundredfold.
ALWAYS_INLINE uint32_t moment_bits(float value) {
  const uint32_t bits = canonical_bits(value);
  return (bits & 0x7F800000u) == 0 ? 0u : bits;
}

// The master in a bf16 and a signed residual, as in memory/master.py: beside an even bf16, residual 0x7FFF stands for
// the upper tie, and the master one ulp below that tie moves one ulp down. What is left with a lower half of 0x8000 or
// more rounds up, and the residual, being signed, undoes it.
ALWAYS_INLINE float join_master(bf16 weight, int16_t residual) {
  const uint32_t upper_tie = uint32_t(residual == 0x7FFF) & ~uint32_t(weight);
  return as_float((uint32_t(weight) << 16) + uint32_t(int32_t(residual)) + upper_tie);
}

ALWAYS_INLINE uint32_t storable_bits(float master) {
  const uint32_t bits = canonical_bits(master);
  return bits - ((bits & 0x1FFFFu) - 0x7FFFu < 2u ? 1u : 0u);
}

ALWAYS_INLINE bf16 upper_half(uint32_t storable) { return bf16((storable + 0x8000u) >> 16); }

// Random numbers as a function of (seed, step, element): splitmix64 makes two keys for every 2^32 elements,
// and two rounds of Wellons' lowbias32 hash mix them with the element's low 32 bits. The lower half of the
// result serves exp_avg and the upper half exp_avg_sq.
struct Keys {
  uint32_t first, second;
};

inline uint64_t splitmix64(uint64_t x) {
  x += 0x9E3779B97F4A7C15ull;
  x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9ull;
  x = (x ^ (x >> 27)) * 0x94D049BB133111EBull;
  return x ^ (x >> 31);
}

inline Keys make_keys(uint64_t seed, uint64_t step, uint64_t element) {
  const uint64_t key = splitmix64(splitmix64(splitmix64(seed) ^ step) ^ (element >> 32));
  return {uint32_t(key), uint32_t(key >> 32)};
}

ALWAYS_INLINE uint32_t random_bits(Keys keys, uint32_t element) {
  uint32_t x = element ^ keys.first;
  x = (x ^ (x >> 16)) * 0x7FEB352Du;
  x = (x ^ (x >> 15) ^ keys.second) * 0x846CA68Bu;
  return x ^ (x >> 16);
}

// Rounds up with the probability of the part that is cut off: unbiased. `random`: 16 bits.
ALWAYS_INLINE bf16 round_stochastic(uint32_t bits, uint32_t random) { return bf16((bits + random) >> 16); }

// Denormals are honoured whatever mode the calling thread is in (torch.set_flush_denormal, -ffast-math).
class IeeeMode {
 public:
#if defined(__x86_64__)
  IeeeMode() : saved_(_mm_getcsr()) { _mm_setcsr(0x1F80); }
  ~IeeeMode() { _mm_setcsr(saved_); }

 private:
  unsigned saved_;
#elif defined(__aarch64__)
  IeeeMode() {
    asm volatile("mrs %0, fpcr" : "=r"(saved_));
    asm volatile("msr fpcr, %0" ::"r"(uint64_t{0}));
  }
  ~IeeeMode() { asm volatile("msr fpcr, %0" ::"r"(saved_)); }

 private:
  uint64_t saved_;
#else
  IeeeMode() {}
#endif
};

}  // namespace
