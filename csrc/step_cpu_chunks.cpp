// The element loops of the CPU backend, compiled once for each instruction set (LRS_ISA).
#include <cstring>
#include <type_traits>

#include "element_storage.h"
#include "float16_pieces.h"
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

// Elements that are worked through together where something is kept aside for each: few enough for
// the nearest cache, and so many that one block of quantisation need not wait for the one before.
constexpr int32_t kBatch = 4 * kQuantBlock;

// Calls body(begin, count) for parts of the elements; the count of all but the last may be a
// constant that the compiler sees.
template <int32_t kMost, typename Body>
LRS_HOST_DEVICE void visit_parts(int64_t begin, int64_t end, const Body& body) {
  for (; begin + kMost <= end; begin += kMost) {
    body(begin, std::integral_constant<int32_t, kMost>());
  }
  if (begin < end) body(begin, static_cast<int32_t>(end - begin));
}

// Draws 16 random bits for each of `count` elements from `begin`, which must be even, on. There
// must be room for an even number.
LRS_HOST_DEVICE void fill_random(uint32_t key, int64_t begin, int32_t count,
                                 uint16_t* __restrict__ random) {
  uint32_t pair_key = key_from(key, begin);
  for (int32_t i = 0; i < count; i += 2, pair_key += kKeyStep) {
    const uint32_t bits = random_pair(pair_key, 0);
    std::memcpy(random + i, &bits, sizeof(bits));  // low half first, as memory has it
  }
}

// Updates `count` elements from `begin` on. `random` may be null where nothing is rounded at
// random.
template <typename Update, int kNumStates, typename Param, typename State>
LRS_HOST_DEVICE void update_elements(const Update& update, const Elements& elements, int64_t begin,
                                     int32_t count, const uint16_t* __restrict__ random) {
  using Value = typename Param::Value;
  using StateValue = typename State::Value;
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
    const uint32_t bits = kRoundsAtRandom<kNumStates, Param, State> ? random[i] : 0;
    int16_t low = 0;
    if constexpr (Param::kIsSplit) low = remainder[i];
    float value = Param::load(param[i], low);
    float state[kMaxStates];
    if constexpr (kNumStates > 0) state[0] = load(state0[i]);
    if constexpr (kNumStates > 1) state[1] = load(state1[i]);
    if constexpr (kNumStates > 2) state[2] = load(state2[i]);
    update.template apply<kNumStates, State::kType>(value, load(grad[i]), state);
    if constexpr (kNumStates > 0) State::store(state0[i], state[0], bits);
    if constexpr (kNumStates > 1) State::store(state1[i], state[1], bits);
    if constexpr (kNumStates > 2) State::store(state2[i], state[2], bits);
    Param::store(param[i], low, value, bits);
    if constexpr (Param::kIsSplit) remainder[i] = low;
  }
}

template <typename Update, int kNumStates, typename Param, typename State>
void update_all(const Update update, const Elements& elements) {
  const Range range = elements.range;
  if constexpr (kRoundsAtRandom<kNumStates, Param, State>) {
    alignas(64) uint16_t random[kBatch];
    visit_parts<kBatch>(range.begin, range.end, [&](int64_t begin, auto count) {
      fill_random(elements.random_key, begin, count, random);
      update_elements<Update, kNumStates, Param, State>(update, elements, begin, count, random);
    });
  } else {
    const auto count = static_cast<int32_t>(range.end - range.begin);
    update_elements<Update, kNumStates, Param, State>(update, elements, range.begin, count,
                                                      nullptr);
  }
}

// What is left to encode of a block of quantisation whose elements have been updated.
template <int kNumStates>
struct KeptBlock {
  alignas(64) uint16_t random[kQuantBlock];
  alignas(64) float states[kNumStates][kQuantBlock];
  uint32_t largest[kNumStates];  // the bits of the largest magnitude
};

LRS_HOST_DEVICE uint32_t larger(uint32_t a, uint32_t b) { return a > b ? a : b; }

// Updates the `count` elements of the block that begins at `begin`.
template <typename Update, int kNumStates, typename Param>
LRS_HOST_DEVICE void update_block(const Update& update, const Elements& elements, int64_t begin,
                                  int32_t count, KeptBlock<kNumStates>& kept) {
  using Value = typename Param::Value;
  constexpr bool kIsRoot1 = Update::kRootState == 1;
  const TensorEntry& entry = *elements.entry;
  const int64_t block = begin / kQuantBlock;
  Value* __restrict__ param = static_cast<Value*>(entry.param) + begin;
  const Value* __restrict__ grad = static_cast<const Value*>(elements.gradient) + begin;
  int16_t* __restrict__ remainder = array_at<int16_t>(entry.remainder, begin);
  const uint8_t* __restrict__ codes0 = array_at<uint8_t>(entry.states[0], begin);
  const uint8_t* __restrict__ codes1 = array_at<uint8_t>(entry.states[1], begin);
  const float scale0 = entry.scales[0][block];
  const float scale1 = kNumStates > 1 ? entry.scales[1][block] : 0.0f;
  fill_random(elements.random_key, begin, count, kept.random);
  uint32_t largest0 = 0, largest1 = 0;
#pragma GCC ivdep
  for (int32_t i = 0; i < count; ++i) {
    int16_t low = 0;
    if constexpr (Param::kIsSplit) low = remainder[i];
    float value = Param::load(param[i], low);
    float state[kMaxStates];
    state[0] = Block8State::decode<false>(codes0[i], scale0);
    if constexpr (kNumStates > 1) state[1] = Block8State::decode<kIsRoot1>(codes1[i], scale1);
    update.template apply<kNumStates, StateType::kBlock8>(value, load(grad[i]), state);
    kept.states[0][i] = state[0];
    largest0 = larger(largest0, magnitude_bits<false>(state[0]));
    if constexpr (kNumStates > 1) {
      kept.states[1][i] = state[1];
      largest1 = larger(largest1, magnitude_bits<kIsRoot1>(state[1]));
    }
    Param::store(param[i], low, value, kept.random[i]);
    if constexpr (Param::kIsSplit) remainder[i] = low;
  }
  kept.largest[0] = largest0;
  if constexpr (kNumStates > 1) kept.largest[1] = largest1;
}

template <typename Update, int kNumStates>
LRS_HOST_DEVICE void encode_block(const TensorEntry& entry, int64_t begin, int32_t count,
                                  const KeptBlock<kNumStates>& kept) {
  constexpr bool kIsRoot1 = Update::kRootState == 1;
  const int64_t block = begin / kQuantBlock;
  uint8_t* __restrict__ codes0 = array_at<uint8_t>(entry.states[0], begin);
  uint8_t* __restrict__ codes1 = array_at<uint8_t>(entry.states[1], begin);
  const float scale0 = block_scale<false>(kept.largest[0]);
  const float factor0 = multiple_factor(scale0);
  float factor1 = 0.0f;
  entry.scales[0][block] = scale0;
  if constexpr (kNumStates > 1) {
    const float scale1 = block_scale<kIsRoot1>(kept.largest[1]);
    factor1 = multiple_factor(scale1);
    entry.scales[1][block] = scale1;
  }
#pragma GCC ivdep
  for (int32_t i = 0; i < count; ++i) {
    const uint32_t bits = kept.random[i];
    codes0[i] = Block8State::encode<false>(kept.states[0][i] * factor0, bits) >> 24;
    if constexpr (kNumStates > 1) {
      codes1[i] = Block8State::encode<kIsRoot1>(kept.states[1][i] * factor1, bits) >> 24;
    }
  }
}

// As update_all for block-quantised states: a block's scale is known only when all of it has been
// updated.
template <typename Update, int kNumStates, typename Param>
void update_blocks(const Update& update, const Elements& elements) {
  KeptBlock<kNumStates> kept[kBatch / kQuantBlock];
  const int64_t end = elements.range.end;
  for (int64_t batch = elements.range.begin; batch < end; batch += kBatch) {
    const int64_t batch_end = batch + kBatch < end ? batch + kBatch : end;
    visit_parts<kQuantBlock>(batch, batch_end, [&](int64_t begin, auto count) {
      update_block<Update, kNumStates, Param>(update, elements, begin, count,
                                              kept[(begin - batch) / kQuantBlock]);
    });
    visit_parts<kQuantBlock>(batch, batch_end, [&](int64_t begin, auto count) {
      encode_block<Update, kNumStates>(*elements.entry, begin, count,
                                       kept[(begin - batch) / kQuantBlock]);
    });
  }
}

template <typename Update, int kNumStates, typename State>
void update_params(const Update& update, const Elements& elements, bool rounds_stochastically) {
  const auto run = [&](auto param) {
    using Param = decltype(param);
    if constexpr (State::kType == StateType::kBlock8 && kNumStates > 0) {
      update_blocks<Update, kNumStates, Param>(update, elements);
    } else {
      update_all<Update, kNumStates, Param, State>(update, elements);
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
      if constexpr (State::kType == StateType::kFloat32) {
        const auto update_piece = [&](const TensorEntry& entry, const void* gradient, Range range) {
          update_all<Update, kNumStates, NearestParam<float>, State>(
              update, {&entry, gradient, range, elements.random_key});
        };
        visit_as_float32<true>(*elements.entry, elements.gradient, elements.range, update_piece);
      }
  }
}

// Adam without coupled weight decay, whose select costs 5 to 9 % of the time of the loops over
// compressed states: they wait for arithmetic.
struct UncoupledAdam : Adam {
  template <int kNumStates, StateType kStateType>
  LRS_HOST_DEVICE void apply(float& param, float grad, float* state) const {
    Adam::apply<kNumStates, kStateType, false>(param, grad, state);
  }
};

template <typename Update, int kNumStates, typename State>
void update_compressed(const Update& update, const Elements& elements, bool rounds_stochastically) {
  if constexpr (std::is_same_v<Update, Adam>) {
    if (update.coupled_decay == 0.0f) {
      return update_params<UncoupledAdam, kNumStates, State>({update}, elements,
                                                             rounds_stochastically);
    }
  }
  update_params<Update, kNumStates, State>(update, elements, rounds_stochastically);
}

template <typename Update, int kNumStates>
void update_states(const Update& update, const Elements& elements, const StepTable& table) {
  const bool stochastic = table.rounds_stochastically;
  if constexpr (kNumStates > 0 && kNumStates <= kMaxCompressedStates) {
    if (table.state_type == StateType::kBFloat16) {
      return update_compressed<Update, kNumStates, BFloat16State>(update, elements, stochastic);
    }
    if (table.state_type == StateType::kBlock8) {
      return update_compressed<Update, kNumStates, Block8State>(update, elements, stochastic);
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
