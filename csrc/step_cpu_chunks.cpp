// The element loops of the CPU backend, compiled once for each instruction set (LRS_ISA).
#include "element_storage.h"
#include "step_cpu.h"

namespace lrs {
namespace LRS_ISA {
namespace {

// The elements of one tensor that one loop updates.
struct Elements {
  const TensorEntry* entry;
  const void* gradient;
  Range range;
  uint32_t random_key;
};

template <typename T>
T* array_at(void* address, int64_t begin) {
  return address == nullptr ? nullptr : static_cast<T*>(address) + begin;
}

template <typename Update, int kNumStates, typename Param, typename State>
void update_elements(const Update& update, const Elements& elements) {
  using Value = typename Param::Value;
  using StateValue = typename State::Value;
  const auto count = static_cast<int32_t>(elements.range.end - elements.range.begin);
  const int64_t begin = elements.range.begin;
  const auto first = static_cast<uint32_t>(begin);
  const uint32_t key = elements.random_key;
  const TensorEntry& entry = *elements.entry;
  Value* __restrict__ param = static_cast<Value*>(entry.param) + begin;
  const Value* __restrict__ grad = static_cast<const Value*>(elements.gradient) + begin;
  int16_t* __restrict__ remainder = array_at<int16_t>(entry.remainder, begin);
  StateValue* __restrict__ state0 = array_at<StateValue>(entry.states[0], begin);
  StateValue* __restrict__ state1 = array_at<StateValue>(entry.states[1], begin);
  StateValue* __restrict__ state2 = array_at<StateValue>(entry.states[2], begin);
  // GCC forgets __restrict__ when it inlines, and would compare addresses before each loop.
#pragma GCC ivdep
  for (int32_t i = 0; i < count; ++i) {
    uint32_t random = 0;
    if constexpr (Param::kIsRandom || (State::kIsRandom && kNumStates > 0)) {
      random = random_bits(key, first + static_cast<uint32_t>(i));
    }
    int16_t low = 0;
    if constexpr (Param::kIsSplit) low = remainder[i];
    float value = Param::load(param[i], low);
    float state[kMaxStates];
    if constexpr (kNumStates > 0) state[0] = load(state0[i]);
    if constexpr (kNumStates > 1) state[1] = load(state1[i]);
    if constexpr (kNumStates > 2) state[2] = load(state2[i]);
    update.template apply<kNumStates, State::kType>(value, load(grad[i]), state);
    if constexpr (kNumStates > 0) State::store(state0[i], state[0], state_random(random, 0));
    if constexpr (kNumStates > 1) State::store(state1[i], state[1], state_random(random, 1));
    if constexpr (kNumStates > 2) State::store(state2[i], state[2], 0);
    Param::store(param[i], low, value, random & 0xffffu);
    if constexpr (Param::kIsSplit) remainder[i] = low;
  }
}

// `largest` has the bits of the largest magnitude among the values.
template <bool kIsRoot>
LRS_HOST_DEVICE void encode_block(const float* __restrict__ values,
                                  const uint32_t* __restrict__ random, int index, int32_t largest,
                                  int32_t count, uint8_t* __restrict__ codes, float* scale) {
  *scale = block_scale(static_cast<uint32_t>(largest));
  const float factor = share_factor(*scale);
  for (int32_t i = 0; i < count; ++i) {
    codes[i] = Block8State::encode<kIsRoot>(values[i] * factor, state_random(random[i], index));
  }
}

// The larger of two magnitudes as bits: for them, the order of floats is that of integers, and nan
// is above infinity.
LRS_HOST_DEVICE int32_t larger_magnitude(int32_t largest, float value) {
  const auto magnitude = static_cast<int32_t>(to_bits(value) & 0x7fffffffu);
  return magnitude > largest ? magnitude : largest;
}

// Updates the elements of one block of quantisation, of which `count` exist.
template <typename Update, int kNumStates, typename Param>
LRS_HOST_DEVICE void update_block(const Update& update, const Elements& elements, int64_t begin,
                                  int32_t count) {
  using Value = typename Param::Value;
  constexpr bool kIsRoot1 = Update::kRootState == 1;
  const TensorEntry& entry = *elements.entry;
  const uint32_t key = elements.random_key;
  const auto first = static_cast<uint32_t>(begin);
  const int64_t block = begin / kQuantBlock;
  Value* __restrict__ param = static_cast<Value*>(entry.param) + begin;
  const Value* __restrict__ grad = static_cast<const Value*>(elements.gradient) + begin;
  int16_t* __restrict__ remainder = array_at<int16_t>(entry.remainder, begin);
  uint8_t* __restrict__ codes0 = array_at<uint8_t>(entry.states[0], begin);
  uint8_t* __restrict__ codes1 = array_at<uint8_t>(entry.states[1], begin);
  const float scale0 = entry.scales[0][block];
  const float scale1 = kNumStates > 1 ? entry.scales[1][block] : 0.0f;
  alignas(64) uint32_t random[kQuantBlock];
  alignas(64) float kept0[kQuantBlock];
  alignas(64) float kept1[kQuantBlock];
  int32_t largest0 = 0, largest1 = 0;
#pragma GCC ivdep
  for (int32_t i = 0; i < count; ++i) {
    random[i] = random_bits(key, first + static_cast<uint32_t>(i));
    int16_t low = 0;
    if constexpr (Param::kIsSplit) low = remainder[i];
    float value = Param::load(param[i], low);
    float state[kMaxStates];
    state[0] = Block8State::decode<false>(codes0[i], scale0);
    if constexpr (kNumStates > 1) state[1] = Block8State::decode<kIsRoot1>(codes1[i], scale1);
    update.template apply<kNumStates, StateType::kBlock8>(value, load(grad[i]), state);
    kept0[i] = state[0];
    largest0 = larger_magnitude(largest0, kept0[i]);
    if constexpr (kNumStates > 1) {
      kept1[i] = state[1];
      largest1 = larger_magnitude(largest1, kept1[i]);
    }
    Param::store(param[i], low, value, random[i] & 0xffffu);
    if constexpr (Param::kIsSplit) remainder[i] = low;
  }
  encode_block<false>(kept0, random, 0, largest0, count, codes0, entry.scales[0] + block);
  if constexpr (kNumStates > 1) {
    encode_block<kIsRoot1>(kept1, random, 1, largest1, count, codes1, entry.scales[1] + block);
  }
}

// As update_elements for block-quantised states: block by block, because a block's scale is known
// only when all of it has been updated.
template <typename Update, int kNumStates, typename Param>
void update_blocks(const Update& update, const Elements& elements) {
  int64_t begin = elements.range.begin;
  for (; begin + kQuantBlock <= elements.range.end; begin += kQuantBlock) {
    update_block<Update, kNumStates, Param>(update, elements, begin, kQuantBlock);
  }
  if (begin < elements.range.end) {
    const auto count = static_cast<int32_t>(elements.range.end - begin);
    update_block<Update, kNumStates, Param>(update, elements, begin, count);
  }
}

template <typename Update, int kNumStates, typename State>
void update_params(const Update& update, const Elements& elements, bool rounds_stochastically) {
  const auto run = [&](auto param) {
    using Param = decltype(param);
    if constexpr (State::kType == StateType::kBlock8 && kNumStates > 0) {
      update_blocks<Update, kNumStates, Param>(update, elements);
    } else {
      update_elements<Update, kNumStates, Param, State>(update, elements);
    }
  };
  switch (elements.entry->dtype) {
    case DType::kFloat32:
      return run(NearestParam<float>());
    case DType::kBFloat16:
      if (elements.entry->remainder != nullptr) return run(SplitParam());
      if (rounds_stochastically) return run(StochasticParam());
      return run(NearestParam<BFloat16>());
    case DType::kFloat16:
      if constexpr (State::kType == StateType::kFloat32) return run(NearestParam<Float16>());
  }
}

template <typename Update, int kNumStates>
void update_states(const Update& update, const Elements& elements, const StepTable& table) {
  const bool stochastic = table.rounds_stochastically;
  if constexpr (kNumStates > 0 && kNumStates <= kMaxCompressedStates) {
    if (table.state_type == StateType::kBFloat16) {
      return update_params<Update, kNumStates, BFloat16State>(update, elements, stochastic);
    }
    if (table.state_type == StateType::kBlock8) {
      return update_params<Update, kNumStates, Block8State>(update, elements, stochastic);
    }
  }
  return update_params<Update, kNumStates, Float32State>(update, elements, stochastic);
}

template <typename Update>
void update_range(const Update& update, const Elements& elements, const StepTable& table) {
  if (elements.entry->states[Update::kMaxStates - 1] != nullptr) {
    update_states<Update, Update::kMaxStates>(update, elements, table);
  } else {
    update_states<Update, Update::kMinStates>(update, elements, table);
  }
}

template <typename Update>
void step_chunks_of(const StepTable& table, const void* const* gradients, int64_t first,
                    int64_t last) {
  // Neighbouring tensors mostly share group and step count, so the coefficients are kept.
  Update update{};
  int64_t folded_group = -1;
  double folded_step = 0.0;
  const double scale = grad_scale(table.scaling);
  for (int64_t i = first; i < last; ++i) {
    const Chunk chunk = table.chunks[i];
    const void* gradient = gradients[chunk.tensor];
    if (gradient == nullptr) continue;
    const TensorEntry& entry = table.tensors[chunk.tensor];
    const double step = static_cast<double>(*entry.step) + 1.0;
    if (entry.group != folded_group || step != folded_step) {
      update = fold<Update>(table, entry, scale);
      folded_group = entry.group;
      folded_step = step;
    }
    const Range range = chunk_range(entry.numel, table.chunk_elements, chunk.index);
    const uint32_t key =
        is_random(table) ? random_key(*table.step, entry.position, range.begin) : 0;
    update_range(update, {&entry, gradient, range, key}, table);
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
