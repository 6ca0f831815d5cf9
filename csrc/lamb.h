// LAMB: an element's move depends on its whole tensor, so a step takes two passes.
//
// The first moves the moments and sums the squares of the parameters and of their directions, chunk
// by chunk; the sums of a tensor's chunks are then added up in order. The second computes the
// directions again from the moments, which costs less traffic than keeping them, and moves the
// parameters.
#pragma once

#include <cmath>

#include "tensor_table.h"

namespace lrs {
inline namespace LRS_ISA {

// You et al., Large Batch Optimization for Deep Learning: Training BERT in 76 minutes, ICLR 2020,
// arXiv 1904.00962, algorithm 2, with the identity for its phi.
struct LAMB {
  double lr;
  float grad_factor, weight_decay, beta1, beta2, grad_share1, grad_share2, exp_avg_scale,
      denominator_scale, eps;
  bool adapts;

  static LRS_HOST_DEVICE LAMB fold(const double* hyper, double lr, double step, double grad_scale) {
    Powers powers{0.0, 0.0};
    if (hyper[kBiasCorrection] != 0.0) powers = integer_powers(hyper[kBeta1], hyper[kBeta2], step);
    const double bias_correction1 = 1.0 - powers.first, bias_correction2 = 1.0 - powers.second;
    LAMB update;
    update.lr = lr;
    update.grad_factor = static_cast<float>(hyper[kMaximize] != 0.0 ? -grad_scale : grad_scale);
    update.weight_decay = static_cast<float>(hyper[kWeightDecay]);
    update.beta1 = static_cast<float>(hyper[kBeta1]);
    update.beta2 = static_cast<float>(hyper[kBeta2]);
    update.grad_share1 = static_cast<float>(1.0 - hyper[kBeta1]);
    update.grad_share2 = static_cast<float>(1.0 - hyper[kBeta2]);
    update.exp_avg_scale = static_cast<float>(1.0 / bias_correction1);
    update.denominator_scale = static_cast<float>(1.0 / sqrt(bias_correction2));
    update.eps = with_reciprocal(hyper[kEps]);
    update.adapts = hyper[kAlwaysAdapt] != 0.0 || hyper[kWeightDecay] != 0.0;
    return update;
  }

  LRS_HOST_DEVICE void move_moments(float grad, float& exp_avg, float& exp_avg_sq) const {
    grad *= grad_factor;
    exp_avg = beta1 * exp_avg + grad_share1 * grad;
    exp_avg_sq = beta2 * exp_avg_sq + grad_share2 * (grad * grad);
  }

  LRS_HOST_DEVICE float direction(float param, float exp_avg, float exp_avg_sq) const {
    const float denominator = square_root<false>(exp_avg_sq) * denominator_scale + eps;
    const float adam = exp_avg_scale * (exp_avg * reciprocal<false>(denominator));
    return weight_decay != 0.0f ? adam + weight_decay * param : adam;
  }

  // The learning rate times the trust ratio of a tensor: |param| / |direction|, or 1 where either
  // is 0.
  LRS_HOST_DEVICE float step_size(const Squares& tensor) const {
    const bool has_ratio = adapts && tensor.param != 0.0 && tensor.direction != 0.0;
    return static_cast<float>(has_ratio ? lr * (sqrt(tensor.param) / sqrt(tensor.direction)) : lr);
  }
};

}  // namespace LRS_ISA
}  // namespace lrs
