// The parameter update on the host: one pass over weights, residual, gradient and moments.
//
// Plain C interface, called through ctypes (see src/horizon_lm/optim/kernel.py, which fills `Update`).
// Every element is computed by IEEE operations in one fixed order, so that the bits do not depend on the
// instruction set, the number of threads, or how a run is cut into calls. Compile without anything that
// changes arithmetic: -ffp-contract=off (no fused multiply-add), never -ffast-math.
//
//   update_plain     the reference: one scalar loop, every case decided inside it
//   update_piece     the same arithmetic as a template without branches, which the compiler turns into
//                    vector code for each instruction set; chosen at run time
//   element.h        bits, rounding, random numbers
//   dispatch.h       instruction sets and threads
//
// Ordinary stores: each cache line that is written was read just before, so non-temporal ones save nothing.

#include <cmath>
#include <cstdint>
#include <type_traits>

#include "dispatch.h"
#include "element.h"

namespace {

enum Rule : int32_t { kAdamW, kAdam, kSgd, kLion };

}  // namespace

// One call. Mirrored field by field in kernel.py.
struct Update {
  int64_t count;           // elements
  void* weights;           // fp32 [count], or bf16 [count] with
  int16_t* residual;       //   int16 [count]: the lower half of the fp32 master
  const void* grads;       // bf16 or fp32 [count]
  void* exp_avg;           // fp32 or bf16 [count]
  void* exp_avg_sq;        // as exp_avg; unused by sgd and lion
  uint64_t element_offset; // of element 0 in the whole store: with seed and step, the random numbers' counter
  uint64_t seed, step;
  int32_t rule, weight_dtype, grad_dtype, moment_dtype, isa, threads;
  // Numbers that do not depend on the element, computed in double and rounded once (rules.py).
  float grad_scale;    // clipping factor
  float decay;         // 1 - lr * weight_decay            adamw, lion
  float weight_decay;  // added to the gradient            adam, sgd
  float take1;         // 1 - beta1                        adamw, adam, lion
  float take2;         // 1 - beta2                        adamw, adam, lion
  float beta2;         //                                  adamw, adam
  float rescale2;      // 1 / sqrt(1 - beta2 ** step)      adamw, adam
  float epsilon;       //                                  adamw, adam
  float momentum;      //                                  sgd
  float step_size;     // lr / (1 - beta1 ** step); lr for sgd, lion
};

namespace {

// As torch.lerp: from the nearer end, so that all of `weight` 1 is `end`, however much larger `start` is.
ALWAYS_INLINE float lerp(float start, float end, float weight) {
  const bool near_start = weight < 0.5f;
  return (near_start ? start : end) + (end - start) * (near_start ? weight : weight - 1.0f);
}

// ---- the reference: one scalar loop ---------------------------------------------------------------------

float load(const void* run, int32_t dtype, int64_t i) {
  return dtype == kFloat32 ? static_cast<const float*>(run)[i]
                           : as_float(uint32_t(static_cast<const bf16*>(run)[i]) << 16);
}

void store_moment(void* run, int32_t dtype, int64_t i, float value, uint32_t random) {
  if (dtype == kFloat32) {
    static_cast<float*>(run)[i] = as_float(moment_bits(value));
  } else {
    static_cast<bf16*>(run)[i] = round_stochastic(moment_bits(value), random & 0xFFFFu);
  }
}

void update_plain(const Update& u, int64_t begin, int32_t count) {
  for (int64_t i = begin; i < begin + count; i++) {
    const bool split = u.weight_dtype == kBFloat16;
    float master = split ? join_master(static_cast<bf16*>(u.weights)[i], u.residual[i])
                         : static_cast<float*>(u.weights)[i];
    float grad = load(u.grads, u.grad_dtype, i) * u.grad_scale;
    float m = load(u.exp_avg, u.moment_dtype, i);
    const uint64_t element = u.element_offset + uint64_t(i);
    const uint32_t random = random_bits(make_keys(u.seed, u.step, element), uint32_t(element));
    switch (u.rule) {
      case kAdamW:
      case kAdam: {
        if (u.rule == kAdamW) {
          master = master * u.decay;
        } else {
          grad = grad + master * u.weight_decay;
        }
        m = lerp(m, grad, u.take1);
        float v = load(u.exp_avg_sq, u.moment_dtype, i);
        v = v * u.beta2 + (grad * u.take2) * grad;
        const float root = std::sqrt(v) * u.rescale2;
        master = master - (m * u.step_size) / (root + u.epsilon);
        store_moment(u.exp_avg_sq, u.moment_dtype, i, v, random >> 16);
        break;
      }
      case kSgd:
        grad = grad + master * u.weight_decay;
        m = m * u.momentum + grad;
        master = master - m * u.step_size;
        break;
      case kLion: {
        master = master * u.decay;
        const float direction = lerp(m, grad, u.take1);
        const float sign = direction > 0 ? 1.0f : direction < 0 ? -1.0f : direction;  // NaN stays NaN
        master = master - sign * u.step_size;
        m = lerp(m, grad, u.take2);
        break;
      }
    }
    store_moment(u.exp_avg, u.moment_dtype, i, m, random);
    if (split) {
      const uint32_t bits = storable_bits(master);
      static_cast<bf16*>(u.weights)[i] = upper_half(bits);
      u.residual[i] = int16_t(uint16_t(bits));
    } else {
      static_cast<float*>(u.weights)[i] = as_float(canonical_bits(master));
    }
  }
}

// ---- the same for vector units --------------------------------------------------------------------------

ALWAYS_INLINE void narrow(float& place, float value, uint32_t) { place = as_float(moment_bits(value)); }
ALWAYS_INLINE void narrow(bf16& place, float value, uint32_t random) {
  place = round_stochastic(moment_bits(value), random);
}

// Weight: bf16 means with residual. Elements [begin, begin + count) lie in one block of 2^32 of the store.
template <int kRule, typename Weight, typename Grad, typename Moment>
ALWAYS_INLINE void update_piece(const Update& u, int64_t begin, int32_t count) {
  constexpr bool kSplit = std::is_same<Weight, bf16>::value;
  constexpr bool kRandom = std::is_same<Moment, bf16>::value;
  constexpr bool kAdaptive = kRule == kAdamW || kRule == kAdam;
  Weight* __restrict weights = static_cast<Weight*>(u.weights) + begin;
  int16_t* __restrict residual = kSplit ? u.residual + begin : nullptr;
  const Grad* __restrict grads = static_cast<const Grad*>(u.grads) + begin;
  Moment* __restrict exp_avg = static_cast<Moment*>(u.exp_avg) + begin;
  Moment* __restrict exp_avg_sq = kAdaptive ? static_cast<Moment*>(u.exp_avg_sq) + begin : nullptr;
  const float grad_scale = u.grad_scale, decay = u.decay, weight_decay = u.weight_decay, take1 = u.take1,
              take2 = u.take2, beta2 = u.beta2, rescale2 = u.rescale2, epsilon = u.epsilon,
              momentum = u.momentum, step_size = u.step_size;
  const uint64_t element = u.element_offset + uint64_t(begin);
  const Keys keys = make_keys(u.seed, u.step, element);
  const uint32_t low = uint32_t(element);

  for (int32_t i = 0; i < count; i++) {
    float master;
    if constexpr (kSplit) {
      master = join_master(weights[i], residual[i]);
    } else {
      master = weights[i];
    }
    const uint32_t random = kRandom ? random_bits(keys, low + uint32_t(i)) : 0u;
    float grad = widen(grads[i]) * grad_scale;
    float m = widen(exp_avg[i]);
    if constexpr (kRule == kAdam || kRule == kSgd) {
      grad = grad + master * weight_decay;
    } else {
      master = master * decay;
    }
    if constexpr (kAdaptive) {
      m = lerp(m, grad, take1);
      const float v = widen(exp_avg_sq[i]) * beta2 + (grad * take2) * grad;
      const float root = std::sqrt(v) * rescale2;
      master = master - (m * step_size) / (root + epsilon);
      narrow(exp_avg_sq[i], v, random >> 16);
    } else if constexpr (kRule == kSgd) {
      m = m * momentum + grad;
      master = master - m * step_size;
    } else {
      const float direction = lerp(m, grad, take1);
      const float sign = direction > 0 ? 1.0f : direction < 0 ? -1.0f : direction;
      master = master - sign * step_size;
      m = lerp(m, grad, take2);
    }
    narrow(exp_avg[i], m, random & 0xFFFFu);
    if constexpr (kSplit) {
      const uint32_t bits = storable_bits(master);
      weights[i] = upper_half(bits);
      residual[i] = int16_t(uint16_t(bits));
    } else {
      weights[i] = as_float(canonical_bits(master));
    }
  }
}

ALWAYS_INLINE void triad_piece(float* __restrict a, const float* __restrict b, const float* __restrict c,
                               float scale, int32_t count) {
  for (int32_t i = 0; i < count; i++) a[i] = b[i] + scale * c[i];
}

ALWAYS_INLINE void triad_in_place_piece(float* __restrict a, const float* __restrict b, float scale,
                                        int32_t count) {
  for (int32_t i = 0; i < count; i++) a[i] = a[i] + scale * b[i];
}

// ---- one copy of the code for each instruction set --------------------------------------------------------

using Kernel = void (*)(const Update&, int64_t, int32_t);

#define VARIANT(NAME, TARGET)                                                                        \
  struct NAME {                                                                                      \
    template <int kRule, typename Weight, typename Grad, typename Moment>                            \
    TARGET static void update(const Update& u, int64_t begin, int32_t count) {                       \
      update_piece<kRule, Weight, Grad, Moment>(u, begin, count);                                    \
    }                                                                                                \
    TARGET static void triad(float* a, const float* b, const float* c, float scale, int32_t count) { \
      if (c == nullptr) {                                                                            \
        triad_in_place_piece(a, b, scale, count);                                                    \
      } else {                                                                                       \
        triad_piece(a, b, c, scale, count);                                                          \
      }                                                                                              \
    }                                                                                                \
  };

FOR_EACH_ISA(VARIANT)

template <class Variant, int kRule, typename Weight, typename Grad>
Kernel by_moment(const Update& u) {
  return u.moment_dtype == kFloat32 ? Variant::template update<kRule, Weight, Grad, float>
                                    : Variant::template update<kRule, Weight, Grad, bf16>;
}

template <class Variant, int kRule, typename Weight>
Kernel by_grad(const Update& u) {
  return u.grad_dtype == kFloat32 ? by_moment<Variant, kRule, Weight, float>(u)
                                  : by_moment<Variant, kRule, Weight, bf16>(u);
}

template <class Variant, int kRule>
Kernel by_weight(const Update& u) {
  return u.weight_dtype == kFloat32 ? by_grad<Variant, kRule, float>(u) : by_grad<Variant, kRule, bf16>(u);
}

template <class Variant>
Kernel by_rule(const Update& u) {
  switch (u.rule) {
    case kAdamW: return by_weight<Variant, kAdamW>(u);
    case kAdam: return by_weight<Variant, kAdam>(u);
    case kSgd: return by_weight<Variant, kSgd>(u);
    default: return by_weight<Variant, kLion>(u);
  }
}

}  // namespace

extern "C" {

// To be raised with every change of `Update` or of the functions here and in gradients.cpp: an old library is not loaded.
int32_t horizon_optimizer_version() { return 4; }

int32_t horizon_has_openmp() {
#ifdef _OPENMP
  return 1;
#else
  return 0;
#endif
}

int32_t horizon_isa_available(int32_t isa) { return available(isa) ? 1 : 0; }

int32_t horizon_isa_auto() { return resolve(kAuto); }

// 0; or 1 when the instruction set is missing. The caller has checked pointers, sizes and numbers.
int32_t horizon_update(const Update* update) {
  const Update& u = *update;
  if (!available(u.isa)) return 1;
  Kernel kernel = update_plain;
  switch (resolve(u.isa)) {
    case kPlain: break;
#if defined(__x86_64__)
    case kAvx512: kernel = by_rule<Avx512>(u); break;
    case kAvx2: kernel = by_rule<Avx2>(u); break;
#endif
    default: kernel = by_rule<Baseline>(u);
  }
  for_pieces(u.count, u.element_offset, u.threads,
             [&](int64_t begin, int32_t count) { kernel(u, begin, count); });
  return 0;
}

// STREAM's triad a = b + scale * c; with c null a = a + scale * b, which like the update writes only lines
// that it has read. For the benchmark.
int32_t horizon_triad(float* a, const float* b, const float* c, float scale, int64_t count, int32_t threads) {
  auto* triad = Baseline::triad;
#if defined(__x86_64__)
  if (resolve(kAuto) == kAvx512) triad = Avx512::triad;
  if (resolve(kAuto) == kAvx2) triad = Avx2::triad;
#endif
  for_pieces(count, 0, threads, [&](int64_t begin, int32_t size) {
    triad(a + begin, b + begin, c == nullptr ? nullptr : c + begin, scale, size);
  });
  return 0;
}

}  // extern "C"
