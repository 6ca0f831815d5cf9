// The element loops of the CPU backend, compiled once for each instruction set (LRS_ISA).
#include "step_cpu.h"

namespace lrs {
namespace LRS_ISA {
namespace {

template <typename Update, int kNumStates, typename Param>
void update_elements(const Update& update, const TensorEntry& entry, const void* gradient,
                     Range range) {
  Param* __restrict__ param = static_cast<Param*>(entry.param);
  const Param* __restrict__ grad = static_cast<const Param*>(gradient);
  float* __restrict__ state0 = entry.states[0];
  float* __restrict__ state1 = entry.states[1];
  float* __restrict__ state2 = entry.states[2];
  // GCC forgets __restrict__ when it inlines, and would compare addresses before each loop.
#pragma GCC ivdep
  for (int64_t i = range.begin; i < range.end; ++i) {
    float value = load(param[i]);
    float state[kMaxStates];
    if constexpr (kNumStates > 0) state[0] = state0[i];
    if constexpr (kNumStates > 1) state[1] = state1[i];
    if constexpr (kNumStates > 2) state[2] = state2[i];
    update.template apply<kNumStates>(value, load(grad[i]), state);
    if constexpr (kNumStates > 0) state0[i] = state[0];
    if constexpr (kNumStates > 1) state1[i] = state[1];
    if constexpr (kNumStates > 2) state2[i] = state[2];
    store(param[i], value);
  }
}

template <typename Update, int kNumStates>
void update_range(const Update& update, const TensorEntry& entry, const void* gradient,
                  Range range) {
  switch (entry.dtype) {
    case DType::kFloat32:
      return update_elements<Update, kNumStates, float>(update, entry, gradient, range);
    case DType::kBFloat16:
      return update_elements<Update, kNumStates, BFloat16>(update, entry, gradient, range);
    case DType::kFloat16:
      return update_elements<Update, kNumStates, Float16>(update, entry, gradient, range);
  }
}

template <typename Update>
void step_chunks_of(const StepTable& table, const void* const* gradients, int64_t first,
                    int64_t last) {
  // Neighbouring tensors mostly share group and step count, so the coefficients are kept.
  Update update{};
  int64_t folded_group = -1;
  double folded_step = 0.0;
  for (int64_t i = first; i < last; ++i) {
    const Chunk chunk = table.chunks[i];
    const void* gradient = gradients[chunk.tensor];
    if (gradient == nullptr) continue;
    const TensorEntry& entry = table.tensors[chunk.tensor];
    const double step = static_cast<double>(*entry.step) + 1.0;
    if (entry.group != folded_group || step != folded_step) {
      const Group& group = table.groups[entry.group];
      update = Update::fold(group.hyper, learning_rate(group, *table.step), step);
      folded_group = entry.group;
      folded_step = step;
    }
    const Range range = chunk_range(entry.numel, table.chunk_elements, chunk.index);
    if (entry.states[Update::kMaxStates - 1] != nullptr) {
      update_range<Update, Update::kMaxStates>(update, entry, gradient, range);
    } else {
      update_range<Update, Update::kMinStates>(update, entry, gradient, range);
    }
  }
}

}  // namespace

void step_chunks(const StepTable& table, const void* const* gradients, int64_t first,
                 int64_t last) {
  switch (table.algorithm) {
    case Algorithm::kSGD:
      return step_chunks_of<SGD>(table, gradients, first, last);
    case Algorithm::kAdam:
      return step_chunks_of<Adam>(table, gradients, first, last);
    case Algorithm::kLion:
      return step_chunks_of<Lion>(table, gradients, first, last);
    case Algorithm::kLAMB:
      return;  // it has loops of its own
  }
}

}  // namespace LRS_ISA
}  // namespace lrs
