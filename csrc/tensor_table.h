// The table that one step works through: tensors, parameter groups and chunks of equal length.
//
// Every field is 8 bytes wide, so that the tables are int64 tensors on the Python side, with the
// doubles bit-cast.
#pragma once

#include <vector>

#include "host_device.h"
#include "storage.h"
#include "updates.h"

namespace lrs {

// A parameter and its states, all of the same `numel` and memory order.
struct TensorEntry {
  void* param;
  void* states[kMaxStates];   // null where the update has fewer
  float* scales[kMaxStates];  // one per kQuantBlock elements, if the states are block-quantised
  int16_t* remainder;         // the low halves of split parameters, or null
  float* step;                // updates that this tensor has had
  int64_t numel;
  int64_t group;
  DType dtype;       // of the parameter and its gradient
  int64_t position;  // among all parameters of the optimizer
};

// A number that moves with the step: values[min(step, capacity - 1)]. `values` is null where the
// number is fixed.
struct MovingNumber {
  const float* values;
  int64_t capacity;
};

// A parameter group. Its learning rate is lr[min(step, capacity - 1)].
struct Group {
  const float* lr;
  int64_t capacity;
  double hyper[kNumHyper];
  MovingNumber weight_decay;  // in the place of hyper[kWeightDecay]
  MovingNumber momentum;      // in the place of hyper[kMomentum], which is also kBeta1
};

struct Chunk {
  int32_t tensor;
  int32_t index;  // of the chunk within the tensor
};

// Sums of squares over a chunk or a tensor, of LAMB.
struct Squares {
  double param, direction;
};

// Which passes of LAMB a step makes: both, or one, so that sums over the shards of tensors on
// several devices can be completed between them.
enum class Passes : int { kBoth, kMoments, kParams };

// What a step reads besides its table, if it is there: null where it is not.
struct GradScaling {
  const float* loss_scale;  // by which the loss, and so every gradient, was multiplied
  const float* found_inf;   // if not 0, the step changes nothing
  const float* norm;        // of all gradients as they are stored, to be clipped
  const float* max_norm;    // for the norm of the unscaled gradients
};

// Everything a step needs but the gradients. Pointers are host or device pointers, by backend.
struct StepTable {
  Algorithm algorithm;
  StateType state_type;
  bool rounds_stochastically;  // parameters that are bfloat16 and not split
  const TensorEntry* tensors;
  const TensorEntry* host_tensors;  // the same in host memory, whatever the backend
  int64_t num_tensors;
  const Group* groups;
  const Chunk* chunks;
  int64_t num_chunks;
  int64_t chunk_elements;    // a multiple of kQuantBlock
  int64_t* step;             // committed updates: the position in the schedules
  bool commits_step = true;  // whether it advances by this step
  uint32_t* ticket;  // CUDA: blocks that have finished, 0 between steps; LAMB: then per tensor
  GradScaling scaling;
  Squares* chunk_squares;  // LAMB: what its first pass leaves to the second
  Squares* tensor_squares;
  Passes passes = Passes::kBoth;  // LAMB
};

struct Range {
  int64_t begin, end;
};

inline namespace LRS_ISA {

LRS_HOST_DEVICE int64_t num_chunks_of(int64_t numel, int64_t chunk_elements) {
  return (numel + chunk_elements - 1) / chunk_elements;
}

LRS_HOST_DEVICE Range chunk_range(int64_t numel, int64_t chunk_elements, int64_t index) {
  const int64_t begin = index * chunk_elements;
  const int64_t end = begin + chunk_elements;
  return {begin, end < numel ? end : numel};
}

// The part of `range` that lanes of `lane` elements can serve: it starts at an element where every
// array is aligned to its lane, or to 16 bytes if that is less, and holds a multiple of `lane`
// elements. It is empty if no element is so in all arrays. `bytes` are the element sizes.
template <int kArrays>
LRS_HOST_DEVICE Range vector_range(Range range, int64_t lane, const uint64_t (&addresses)[kArrays],
                                   const int (&bytes)[kArrays]) {
  for (int64_t head = 0; head < lane; ++head) {
    const int64_t begin = range.begin + head;
    bool aligned = true;
    for (int i = 0; i < kArrays; ++i) {
      const uint64_t alignment = lane * bytes[i] < 16 ? lane * bytes[i] : 16;
      aligned &= (addresses[i] + static_cast<uint64_t>(begin * bytes[i])) % alignment == 0;
    }
    if (aligned && begin < range.end) {
      return {begin, begin + (range.end - begin) / lane * lane};
    }
  }
  return {range.end, range.end};
}

LRS_HOST_DEVICE double learning_rate(const Group& group, int64_t step) {
  const int64_t last = group.capacity - 1;
  return static_cast<double>(group.lr[step < last ? step : last]);
}

LRS_HOST_DEVICE double number_at(const MovingNumber& number, double fixed, int64_t step) {
  if (number.values == nullptr) return fixed;
  const int64_t last = number.capacity - 1;
  return static_cast<double>(number.values[step < last ? step : last]);
}

// Whether anything that the step writes is rounded at random.
LRS_HOST_DEVICE bool is_random(const StepTable& table) {
  return table.rounds_stochastically || table.state_type != StateType::kFloat32;
}

LRS_HOST_DEVICE bool is_skipped(const GradScaling& scaling) {
  return scaling.found_inf != nullptr && *scaling.found_inf != 0.0f;
}

// What gradients are multiplied by: the loss scale is undone, and their norm clipped in the way of
// torch.nn.utils.clip_grad_norm_, where nan stays nan.
LRS_HOST_DEVICE double grad_scale(const GradScaling& scaling) {
  double scale = 1.0;
  if (scaling.loss_scale != nullptr) scale = 1.0 / static_cast<double>(*scaling.loss_scale);
  if (scaling.norm != nullptr) {
    const double norm = static_cast<double>(*scaling.norm) * scale;
    const double clip = static_cast<double>(*scaling.max_norm) / (norm + 1e-6);
    scale *= clip >= 1.0 ? 1.0 : clip;
  }
  return scale;
}

// The coefficients of the next update of a tensor, whose gradients are multiplied by `grad_scale`.
template <typename Update>
LRS_HOST_DEVICE Update fold(const StepTable& table, const TensorEntry& entry, double grad_scale) {
  const Group& group = table.groups[entry.group];
  const int64_t step = *table.step;
  double hyper[kNumHyper];
  for (int i = 0; i < kNumHyper; ++i) hyper[i] = group.hyper[i];
  hyper[kWeightDecay] = number_at(group.weight_decay, hyper[kWeightDecay], step);
  hyper[kMomentum] = number_at(group.momentum, hyper[kMomentum], step);
  const double tensor_step = static_cast<double>(*entry.step) + 1.0;
  return Update::fold(hyper, learning_rate(group, step), tensor_step, grad_scale);
}

}  // namespace LRS_ISA

// Cuts tensors into chunks, in order. The chunks of tensor i are [offsets[i], offsets[i + 1]).
inline void build_chunks(const std::vector<int64_t>& numels, int64_t chunk_elements,
                         std::vector<Chunk>* chunks, std::vector<int64_t>* offsets) {
  offsets->assign(1, 0);
  for (size_t i = 0; i < numels.size(); ++i) {
    const int64_t count = num_chunks_of(numels[i], chunk_elements);
    for (int64_t index = 0; index < count; ++index) {
      chunks->push_back({static_cast<int32_t>(i), static_cast<int32_t>(index)});
    }
    offsets->push_back(offsets->back() + count);
  }
}

}  // namespace lrs
