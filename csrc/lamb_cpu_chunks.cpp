// The element loops of LAMB on the CPU, compiled once for each instruction set (LRS_ISA).
#include <algorithm>

#include "array_parts.h"
#include "float16_pieces.h"
#include "lamb.h"
#include "step_cpu.h"

namespace lrs {
namespace LRS_ISA {
namespace {

// Squares are summed in this many sums side by side, whatever the width of the vectors: the order,
// and so every bit, is that of all instruction sets.
constexpr int64_t kSums = 16;
static_assert(kPart % kSums == 0);

class SumOfSquares {
 public:
  // Adds `count` values; up to the next multiple of kSums, there are zeros behind them.
  void add(const float* values, int64_t count) {
    for (int64_t i = 0; i < count; i += kSums) {
      for (int64_t j = 0; j < kSums; ++j) {
        const double value = static_cast<double>(values[i + j]);
        sums_[j] += value * value;
      }
    }
  }

  double total() const {
    double total = 0.0;
    for (const double sum : sums_) total += sum;
    return total;
  }

 private:
  double sums_[kSums] = {};
};

template <typename Param>
Squares move_moments(const LAMB& update, const TensorEntry& entry, const void* gradient,
                     Range range) {
  const Param* __restrict__ param = static_cast<const Param*>(entry.param);
  const Param* __restrict__ grad = static_cast<const Param*>(gradient);
  float* __restrict__ exp_avg = static_cast<float*>(entry.states[0]);
  float* __restrict__ exp_avg_sq = static_cast<float*>(entry.states[1]);
  SumOfSquares params, directions;
  visit_parts(range, [&](int64_t begin, auto count) {
    const int64_t left = entry.numel - begin;
    prefetch_ahead(param + begin, left);
    prefetch_ahead(grad + begin, left);
    prefetch_ahead(exp_avg + begin, left);
    prefetch_ahead(exp_avg_sq + begin, left);
    float param_part[kPart], direction_part[kPart];
    const int32_t elements = count;  // GCC ignores the pragma on a loop up to `count` itself
    // GCC forgets __restrict__ when it inlines, and would compare addresses before each loop.
#pragma GCC ivdep
    for (int32_t i = 0; i < elements; ++i) {
      const float value = load(param[begin + i]);
      float moment1 = exp_avg[begin + i], moment2 = exp_avg_sq[begin + i];
      update.move_moments(load(grad[begin + i]), moment1, moment2);
      exp_avg[begin + i] = moment1;
      exp_avg_sq[begin + i] = moment2;
      param_part[i] = value;
      direction_part[i] = update.direction(value, moment1, moment2);
    }
    const int64_t padded = (count + kSums - 1) / kSums * kSums;
    std::fill(param_part + count, param_part + padded, 0.0f);
    std::fill(direction_part + count, direction_part + padded, 0.0f);
    params.add(param_part, count);
    directions.add(direction_part, count);
  });
  return {params.total(), directions.total()};
}

Squares move_float16_moments(const LAMB& update, const TensorEntry& entry, const void* gradient,
                             Range range) {
  Squares total{};
  const auto move_piece = [&](const TensorEntry& piece, const void* grad_piece, Range piece_range) {
    const Squares squares = move_moments<float>(update, piece, grad_piece, piece_range);
    total.param += squares.param;
    total.direction += squares.direction;
  };
  visit_as_float32<false>(entry, gradient, range, move_piece);
  return total;
}

template <typename Param>
void move_params(const LAMB& update, float step_size, const TensorEntry& entry, Range range) {
  Param* __restrict__ param = static_cast<Param*>(entry.param);
  const float* __restrict__ exp_avg = static_cast<float*>(entry.states[0]);
  const float* __restrict__ exp_avg_sq = static_cast<float*>(entry.states[1]);
  visit_parts(range, [&](int64_t begin, auto count) {
    const int64_t left = entry.numel - begin;
    prefetch_ahead(param + begin, left);
    prefetch_ahead(exp_avg + begin, left);
    prefetch_ahead(exp_avg_sq + begin, left);
    const int64_t end = begin + count;  // outside of the loop as above
#pragma GCC ivdep
    for (int64_t i = begin; i < end; ++i) {
      const float value = load(param[i]);
      store(param[i], value - step_size * update.direction(value, exp_avg[i], exp_avg_sq[i]));
    }
  });
}

Squares move_moments_of(const LAMB& update, const TensorEntry& entry, const void* gradient,
                        Range range) {
  switch (entry.dtype) {
    case DType::kFloat32:
      return move_moments<float>(update, entry, gradient, range);
    case DType::kBFloat16:
      return move_moments<BFloat16>(update, entry, gradient, range);
    case DType::kFloat16:
      return move_float16_moments(update, entry, gradient, range);
  }
  return {};
}

void move_params_of(const LAMB& update, float step_size, const TensorEntry& entry, Range range) {
  switch (entry.dtype) {
    case DType::kFloat32:
      return move_params<float>(update, step_size, entry, range);
    case DType::kBFloat16:
      return move_params<BFloat16>(update, step_size, entry, range);
    case DType::kFloat16:
      return visit_as_float32<true>(entry, nullptr, range,
                                    [&](const TensorEntry& piece, const void*, Range piece_range) {
                                      move_params<float>(update, step_size, piece, piece_range);
                                    });
  }
}

// Calls `visit(update, entry, chunk's number, range)` for each chunk of a tensor with a gradient.
template <typename Visit>
void visit_chunks(const StepTable& table, const void* const* gradients, int64_t first, int64_t last,
                  const Visit& visit) {
  // Neighbouring tensors mostly share group and step count, so the coefficients are kept.
  LAMB update{};
  int64_t folded_group = -1;
  double folded_step = 0.0;
  const double scale = grad_scale(table.scaling);
  for (int64_t i = first; i < last; ++i) {
    const Chunk chunk = table.chunks[i];
    if (gradients[chunk.tensor] == nullptr) continue;
    const TensorEntry& entry = table.tensors[chunk.tensor];
    const double step = static_cast<double>(*entry.step) + 1.0;
    if (entry.group != folded_group || step != folded_step) {
      update = fold<LAMB>(table, entry, scale);
      folded_group = entry.group;
      folded_step = step;
    }
    visit(update, entry, i, chunk_range(entry.numel, table.chunk_elements, chunk.index));
  }
}

}  // namespace

void lamb_moments(const StepTable& table, const void* const* gradients, int64_t first,
                  int64_t last) {
  visit_chunks(table, gradients, first, last,
               [&](const LAMB& update, const TensorEntry& entry, int64_t i, Range range) {
                 const void* gradient = gradients[table.chunks[i].tensor];
                 table.chunk_squares[i] = move_moments_of(update, entry, gradient, range);
               });
}

void lamb_params(const StepTable& table, const void* const* gradients, int64_t first,
                 int64_t last) {
  visit_chunks(table, gradients, first, last,
               [&](const LAMB& update, const TensorEntry& entry, int64_t i, Range range) {
                 const Squares& squares = table.tensor_squares[table.chunks[i].tensor];
                 move_params_of(update, update.step_size(squares), entry, range);
               });
}

}  // namespace LRS_ISA
}  // namespace lrs
