// Gradients in host memory, each in one pass: added to a sum, or rounded to where the update reads them and
// measured on the way.
//
// As in optimizer.cpp the bits depend on neither the instruction set nor the number of threads: an element is
// a fixed order of IEEE operations, and a sum of squares is one of kLanes partial sums of kBlock elements.

#include <cstdint>
#include <cstring>

#include "dispatch.h"
#include "element.h"

namespace {

constexpr int32_t kBlock = 4096, kLanes = 64;

// Sixteen elements: one register, or two, or four, as the instruction set has them.
typedef float Floats __attribute__((vector_size(64)));
typedef uint32_t Words __attribute__((vector_size(64)));
typedef uint16_t Halves __attribute__((vector_size(32)));
constexpr int32_t kWidth = 16;

ALWAYS_INLINE Floats load(const float* place) {
  Floats values;
  std::memcpy(&values, place, sizeof values);
  return values;
}

ALWAYS_INLINE Floats load(const bf16* place) {
  Halves halves;
  std::memcpy(&halves, place, sizeof halves);
  return (Floats)(__builtin_convertvector(halves, Words) << 16);
}

ALWAYS_INLINE void store(float* place, Floats values) { std::memcpy(place, &values, sizeof values); }

// To nearest, ties to even, as torch does.
ALWAYS_INLINE void store(bf16* place, Floats values) {
  const Words bits = (Words)values;
  Words rounded = (bits + 0x7FFFu + (bits >> 16 & 1u)) >> 16;
  const Words is_nan = (Words)((bits & 0x7FFFFFFFu) > 0x7F800000u);
  rounded = (rounded & ~is_nan) | (is_nan & (kNan >> 16));
  const Halves halves = __builtin_convertvector(rounded, Halves);
  std::memcpy(place, &halves, sizeof halves);
}

// A vector of which the first `count` elements are these, and the rest zero.
template <typename Value>
ALWAYS_INLINE Floats load_some(const Value* place, int32_t count) {
  Value padded[kWidth] = {};
  std::memcpy(padded, place, sizeof(Value) * size_t(count));
  return load(padded);
}

// total = (total + first) + second, or first + second where nothing is there yet.
template <typename Source>
ALWAYS_INLINE void add_piece(float* __restrict total, const Source* __restrict first,
                             const Source* __restrict second, bool begins, int32_t count) {
  if (begins) {
    for (int32_t i = 0; i < count; i++) total[i] = widen(first[i]) + widen(second[i]);
  } else {
    for (int32_t i = 0; i < count; i++) total[i] = (total[i] + widen(first[i])) + widen(second[i]);
  }
}

// Of at most kBlock elements, from source to target, or where they are when those are one: the sum of the
// squares of what target holds. Element i is added to lane i % kLanes, in turn; then the lanes are added.
template <typename Source, typename Target>
ALWAYS_INLINE double move_block(const Source* source, Target* target, bool moves, int32_t count) {
  Floats lanes[kLanes / kWidth] = {};
  int32_t i = 0;
  for (; i + kLanes <= count; i += kLanes) {
    for (int32_t k = 0; k < kLanes / kWidth; k++) {
      if (moves) store(target + i + k * kWidth, load(source + i + k * kWidth));
      const Floats values = load(target + i + k * kWidth);
      lanes[k] = lanes[k] + values * values;
    }
  }
  for (int32_t k = 0; i < count; i += kWidth, k++) {
    const int32_t some = count - i < kWidth ? count - i : kWidth;
    if (moves) {
      Target rounded[kWidth];
      store(rounded, load_some(source + i, some));
      std::memcpy(target + i, rounded, sizeof(Target) * size_t(some));
    }
    const Floats values = load_some(target + i, some);
    lanes[k] = lanes[k] + values * values;
  }
  double total = 0;
  for (int32_t k = 0; k < kLanes / kWidth; k++) {
    for (int32_t j = 0; j < kWidth; j++) total += double(lanes[k][j]);
  }
  return total;
}

template <typename Source, typename Target>
ALWAYS_INLINE void move_piece(const Source* source, Target* target, double* squares, int32_t count) {
  const bool moves = static_cast<const void*>(source) != static_cast<const void*>(target);
  for (int32_t begin = 0; begin < count; begin += kBlock) {
    const int32_t size = count - begin < kBlock ? count - begin : kBlock;
    *squares++ = moves ? move_block(source + begin, target + begin, true, size)
                       : move_block(source + begin, target + begin, false, size);
  }
}

using Add = void (*)(float*, const void*, const void*, bool, int64_t, int32_t);
using Move = void (*)(const void*, void*, double*, int64_t, int32_t);

#define VARIANT(NAME, TARGET)                                                                          \
  struct NAME {                                                                                        \
    template <typename Source>                                                                         \
    TARGET static void add(float* total, const void* first, const void* second, bool begins,           \
                           int64_t begin, int32_t count) {                                             \
      add_piece(total + begin, static_cast<const Source*>(first) + begin,                              \
                static_cast<const Source*>(second) + begin, begins, count);                            \
    }                                                                                                  \
    template <typename Source, typename Target>                                                        \
    TARGET static void move(const void* source, void* target, double* squares, int64_t begin,          \
                            int32_t count) {                                                           \
      move_piece(static_cast<const Source*>(source) + begin, static_cast<Target*>(target) + begin,     \
                 squares + begin / kBlock, count);                                                     \
    }                                                                                                  \
  };

FOR_EACH_ISA(VARIANT)

template <class Variant>
Add add_of(int32_t source) {
  return source == kFloat32 ? Variant::template add<float> : Variant::template add<bf16>;
}

template <class Variant>
Move move_of(int32_t source, int32_t target) {
  if (source == kFloat32) {
    return target == kFloat32 ? Variant::template move<float, float> : Variant::template move<float, bf16>;
  }
  return target == kFloat32 ? Variant::template move<bf16, float> : Variant::template move<bf16, bf16>;
}

}  // namespace

extern "C" {

// Both return 0; or 1 when the instruction set is missing. The caller has checked pointers and sizes.

// total[i] = (total[i] + first[i]) + second[i]; without total where it `begins`.
int32_t horizon_add_gradients(float* total, const void* first, const void* second, int32_t dtype, int32_t begins,
                              int64_t count, int32_t isa, int32_t threads) {
  if (!available(isa)) return 1;
  Add add = add_of<Baseline>(dtype);
#if defined(__x86_64__)
  if (resolve(isa) == kAvx512) add = add_of<Avx512>(dtype);
  if (resolve(isa) == kAvx2) add = add_of<Avx2>(dtype);
#endif
  for_pieces(count, 0, threads,
             [&](int64_t begin, int32_t size) { add(total, first, second, begins != 0, begin, size); });
  return 0;
}

// target[i] = source[i], rounded; squares[k]: the sum of squares of target's k-th kBlock elements.
int32_t horizon_move_gradient(const void* source, int32_t source_dtype, void* target, int32_t target_dtype,
                              double* squares, int64_t count, int32_t isa, int32_t threads) {
  if (!available(isa)) return 1;
  Move move = move_of<Baseline>(source_dtype, target_dtype);
#if defined(__x86_64__)
  if (resolve(isa) == kAvx512) move = move_of<Avx512>(source_dtype, target_dtype);
  if (resolve(isa) == kAvx2) move = move_of<Avx2>(source_dtype, target_dtype);
#endif
  for_pieces(count, 0, threads,
             [&](int64_t begin, int32_t size) { move(source, target, squares, begin, size); });
  return 0;
}

}  // extern "C"
