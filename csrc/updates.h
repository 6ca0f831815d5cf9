// Updates: the rule that moves one element. Each is written once here and compiled into the CPU
// loop and the CUDA kernel. LAMB's, which needs two passes, is in lamb.h.
//
// An update folds its hyper-parameters into float coefficients once per tensor and step, in double,
// and then treats elements one by one in float32, in the order of operations of torch.optim. How
// many of its states a tensor has is a template argument of the element rule: the traffic depends
// on it.
#pragma once

#include <cmath>

#include "arithmetic.h"
#include "storage.h"

namespace lrs {

// Which columns of a group's `hyper` an update reads. kMaximize and kWeightDecay serve all.
enum Hyper : int32_t {
  kWeightDecay,
  kMaximize,  // 0 or 1
  kBeta1,
  kBeta2,
  kEps,
  kDecoupled,                    // 0 or 1: AdamW's weight decay
  kAlwaysAdapt,                  // 0 or 1: LAMB's trust ratio without weight decay too
  kBiasCorrection = kDecoupled,  // 0 or 1: LAMB's
  kMomentum = kBeta1,
  kDampening = kBeta2,
  kNesterov = kEps,  // 0 or 1
  kNumHyper = kAlwaysAdapt + 1
};

enum class Algorithm : int32_t { kSGD, kAdam, kLion, kLAMB };

inline constexpr int kMaxStates = 3;            // of any update
inline constexpr int kMaxCompressedStates = 2;  // that are not float32

inline namespace LRS_ISA {

// Robbins and Monro (1951), with the momentum of Sutskever et al. (2013) as torch.optim.SGD has it.
struct SGD {
  static constexpr int kMinStates = 0;
  static constexpr int kMaxStates = 1;  // momentum_buffer
  static constexpr int kRootState = -1;

  float grad_factor, weight_decay, lr, momentum, grad_share;
  uint32_t nesterov;  // all bits 1, or 0

  // `step` counts this update: 1 is the first, whose momentum buffer becomes the gradient itself.
  // `grad_scale` multiplies the gradients.
  static LRS_HOST_DEVICE SGD fold(const double* hyper, double lr, double step, double grad_scale) {
    SGD update;
    update.grad_factor = static_cast<float>(hyper[kMaximize] != 0.0 ? -grad_scale : grad_scale);
    update.weight_decay = static_cast<float>(hyper[kWeightDecay]);
    update.lr = static_cast<float>(lr);
    update.momentum = static_cast<float>(hyper[kMomentum]);
    update.grad_share = step == 1.0 ? 1.0f : static_cast<float>(1.0 - hyper[kDampening]);
    update.nesterov = hyper[kNesterov] != 0.0 ? 0xffffffffu : 0;
    return update;
  }

  template <int kNumStates, StateType kStateType>
  LRS_HOST_DEVICE void apply(float& param, float grad, float* state) const {
    grad *= grad_factor;
    grad = weight_decay != 0.0f ? grad + weight_decay * param : grad;
    if constexpr (kNumStates == 1) {
      float& momentum_buffer = state[0];
      momentum_buffer = momentum * momentum_buffer + grad_share * grad;
      const float ahead = grad + momentum * momentum_buffer;
      if constexpr (kStateType == StateType::kFloat32) {
        grad = nesterov != 0 ? ahead : momentum_buffer;
      } else {
        // In its loops over pairs, GCC does not vectorise two such conditions.
        grad = from_bits((to_bits(ahead) & nesterov) | (to_bits(momentum_buffer) & ~nesterov));
      }
    }
    param -= lr * grad;
  }
};

// Kingma and Ba, Adam, ICLR 2015, arXiv 1412.6980, algorithm 1; decoupled weight decay: Loshchilov
// and Hutter, ICLR 2019, arXiv 1711.05101; amsgrad: Reddi, Kale and Kumar, ICLR 2018.
struct Adam {
  static constexpr int kMinStates = 2;  // exp_avg, exp_avg_sq
  static constexpr int kMaxStates = 3;  // max_exp_avg_sq
  static constexpr int kRootState = 1;  // the mean of squares, if any; only its root is used

  float grad_factor, coupled_decay, param_share, beta1, beta2, grad_share1, grad_share2, step_size,
      denominator_scale, eps;

  static LRS_HOST_DEVICE Adam fold(const double* hyper, double lr, double step, double grad_scale) {
    const bool decoupled = hyper[kDecoupled] != 0.0;
    const Powers powers = integer_powers(hyper[kBeta1], hyper[kBeta2], step);
    const double bias_correction1 = 1.0 - powers.first, bias_correction2 = 1.0 - powers.second;
    Adam update;
    update.grad_factor = static_cast<float>(hyper[kMaximize] != 0.0 ? -grad_scale : grad_scale);
    update.coupled_decay = decoupled ? 0.0f : static_cast<float>(hyper[kWeightDecay]);
    update.param_share = decoupled ? static_cast<float>(1.0 - lr * hyper[kWeightDecay]) : 1.0f;
    update.beta1 = static_cast<float>(hyper[kBeta1]);
    update.beta2 = static_cast<float>(hyper[kBeta2]);
    update.grad_share1 = static_cast<float>(1.0 - hyper[kBeta1]);
    update.grad_share2 = static_cast<float>(1.0 - hyper[kBeta2]);
    update.step_size = static_cast<float>(lr / bias_correction1);
    update.denominator_scale = static_cast<float>(1.0 / sqrt(bias_correction2));
    update.eps = with_reciprocal(hyper[kEps]);
    return update;
  }

  // Of block-quantised states, the mean of squares comes and goes as its root. kMayCouple is false
  // in loops for coupled_decay = 0 alone.
  template <int kNumStates, StateType kStateType, bool kMayCouple = true>
  LRS_HOST_DEVICE void apply(float& param, float grad, float* state) const {
    constexpr bool kKeepsRoot = kStateType == StateType::kBlock8;
    constexpr bool kOverlaps = kStateType != StateType::kFloat32;
    static_assert(kNumStates == 2 || !kOverlaps);
    float& exp_avg = state[0];
    float exp_avg_sq = kKeepsRoot ? state[1] * state[1] : state[1];
    grad *= grad_factor;
    if constexpr (kMayCouple) grad = coupled_decay != 0.0f ? grad + coupled_decay * param : grad;
    param *= param_share;
    exp_avg = beta1 * exp_avg + grad_share1 * grad;
    exp_avg_sq = beta2 * exp_avg_sq + grad_share2 * (grad * grad);
    float second_moment = exp_avg_sq;
    if constexpr (kNumStates == 3) {
      float& max_exp_avg_sq = state[2];
      // As torch.maximum: nan in either operand stays.
      const bool keep = max_exp_avg_sq >= exp_avg_sq || max_exp_avg_sq != max_exp_avg_sq;
      max_exp_avg_sq = keep ? max_exp_avg_sq : exp_avg_sq;
      second_moment = max_exp_avg_sq;
    }
    const float root = square_root<kOverlaps>(second_moment);
    state[1] = kKeepsRoot ? root : exp_avg_sq;
    const float denominator = root * denominator_scale + eps;
    param -= step_size * (exp_avg * reciprocal<kOverlaps>(denominator));
  }
};

// Chen et al., Symbolic Discovery of Optimization Algorithms, NeurIPS 2023, arXiv 2302.06675,
// algorithm 2.
struct Lion {
  static constexpr int kMinStates = 1;  // exp_avg
  static constexpr int kMaxStates = 1;
  static constexpr int kRootState = -1;

  float grad_factor, param_share, lr, beta1, beta2, grad_share1, grad_share2;

  static LRS_HOST_DEVICE Lion fold(const double* hyper, double lr, double, double grad_scale) {
    Lion update;
    update.grad_factor = static_cast<float>(hyper[kMaximize] != 0.0 ? -grad_scale : grad_scale);
    update.param_share = static_cast<float>(1.0 - lr * hyper[kWeightDecay]);
    update.lr = static_cast<float>(lr);
    update.beta1 = static_cast<float>(hyper[kBeta1]);
    update.beta2 = static_cast<float>(hyper[kBeta2]);
    update.grad_share1 = static_cast<float>(1.0 - hyper[kBeta1]);
    update.grad_share2 = static_cast<float>(1.0 - hyper[kBeta2]);
    return update;
  }

  template <int kNumStates, StateType>
  LRS_HOST_DEVICE void apply(float& param, float grad, float* state) const {
    float& exp_avg = state[0];
    grad *= grad_factor;
    const float direction = beta1 * exp_avg + grad_share1 * grad;
    // The sign of 0 is 0; that of nan stays nan.
    const float negative_or_zero = direction < 0.0f ? -1.0f : direction;
    const float sign = direction > 0.0f ? 1.0f : negative_or_zero;
    param = param * param_share - lr * sign;
    exp_avg = beta2 * exp_avg + grad_share2 * grad;
  }
};

}  // namespace LRS_ISA
}  // namespace lrs
