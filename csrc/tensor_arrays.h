// The arrays that the loops of the CPU backend update, by part.
#pragma once

#include <algorithm>

#include "array_parts.h"

namespace lrs {
inline namespace LRS_ISA {

struct Tensor {
  const TensorEntry* entry;
  const void* gradient;
};

// Whether the loop over one tensor can ask for the memory of another: their arrays are of the same
// types, and none is null in one alone.
LRS_HOST_DEVICE bool are_alike(const TensorEntry& entry, const TensorEntry& other) {
  const auto is_shared = [](const void* array, const void* of_other) {
    return (array == nullptr) == (of_other == nullptr);
  };
  bool alike = entry.dtype == other.dtype && is_shared(entry.remainder, other.remainder);
  for (int s = 0; s < kMaxStates; ++s) alike &= is_shared(entry.states[s], other.states[s]);
  return alike;
}

// The elements of one tensor that one loop updates, and the tensor that comes next, if any and if
// it is alike.
struct Elements {
  Tensor tensor;
  Range range;
  uint32_t random_key;
  Tensor next;
};

// The arrays of a tensor from one of its elements on; null where it has none.
template <int kNumStates, typename Param, typename State>
struct Arrays {
  using Value = typename Param::Value;
  using StateValue = typename State::Value;

  Value* param;
  const Value* grad;
  int16_t* remainder;
  StateValue* states[kMaxStates];

  Arrays() = default;
  Arrays(const Tensor& tensor, int64_t begin)
      : param(static_cast<Value*>(tensor.entry->param) + begin),
        grad(static_cast<const Value*>(tensor.gradient) + begin),
        remainder(Param::kIsSplit ? tensor.entry->remainder + begin : nullptr) {
    for (int s = 0; s < kMaxStates; ++s) {
      void* state = tensor.entry->states[s];
      states[s] = s < kNumStates ? static_cast<StateValue*>(state) + begin : nullptr;
    }
  }
};

// Asks for the part that comes kAhead after the one at `begin`, or for one of the next tensor.
template <Cache kCache, int kNumStates, typename Param, typename State>
LRS_HOST_DEVICE void prefetch_ahead(const Elements& elements, int64_t begin) {
  Tensor tensor = elements.tensor;
  int64_t ahead = begin + kAhead;
  if (!has_part(tensor.entry->numel, ahead)) {
    ahead = std::max<int64_t>(ahead - tensor.entry->numel, 0);
    tensor = elements.next;
    if (tensor.entry == nullptr || !has_part(tensor.entry->numel, ahead)) return;
  }
  const Arrays<kNumStates, Param, State> arrays(tensor, ahead);
  prefetch<kCache>(arrays.param);
  prefetch<kCache>(arrays.grad);
  if constexpr (Param::kIsSplit) prefetch<kCache>(arrays.remainder);
  for (int s = 0; s < kNumStates; ++s) prefetch<kCache>(arrays.states[s]);
}

// A copy of an odd number of elements, the last of them twice: an even number.
template <int kNumStates, typename Param, typename State>
class EvenCopy {
 public:
  EvenCopy(const Arrays<kNumStates, Param, State>& from, int32_t count) : count_(count) {
    fill(from.param, param_);
    fill(from.grad, grad_);
    if constexpr (Param::kIsSplit) fill(from.remainder, remainder_);
    for (int s = 0; s < kNumStates; ++s) fill(from.states[s], states_[s]);
  }

  int32_t count() const { return count_ + 1; }

  Arrays<kNumStates, Param, State> arrays() {
    Arrays<kNumStates, Param, State> arrays{};
    arrays.param = param_;
    arrays.grad = grad_;
    arrays.remainder = remainder_;
    for (int s = 0; s < kNumStates; ++s) arrays.states[s] = states_[s];
    return arrays;
  }

  void write_to(const Arrays<kNumStates, Param, State>& target) const {
    std::copy_n(param_, count_, target.param);
    if constexpr (Param::kIsSplit) std::copy_n(remainder_, count_, target.remainder);
    for (int s = 0; s < kNumStates; ++s) std::copy_n(states_[s], count_, target.states[s]);
  }

 private:
  template <typename T>
  void fill(const T* from, T* values) {
    std::copy_n(from, count_, values);
    values[count_] = from[count_ - 1];
  }

  int32_t count_;
  typename Param::Value param_[kPart], grad_[kPart];
  int16_t remainder_[kPart];
  typename State::Value states_[kNumStates][kPart];
};

}  // namespace LRS_ISA
}  // namespace lrs
