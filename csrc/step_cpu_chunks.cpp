// The element loops of the CPU backend, compiled once for each instruction set (LRS_ISA).
#include <cstring>
#include <type_traits>

#include "element_pairs.h"
#include "float16_pieces.h"
#include "step_cpu.h"
#include "tensor_arrays.h"

namespace lrs {
namespace LRS_ISA {
namespace {

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

// Updates `count` elements. `random` may be null where nothing is rounded at random.
template <typename Update, int kNumStates, typename Param, typename State>
LRS_HOST_DEVICE void update_elements(const Update& update,
                                     const Arrays<kNumStates, Param, State>& arrays, int32_t count,
                                     const uint16_t* __restrict__ random) {
  auto* __restrict__ param = arrays.param;
  const auto* __restrict__ grad = arrays.grad;
  auto* __restrict__ remainder = arrays.remainder;
  auto* __restrict__ state0 = arrays.states[0];
  auto* __restrict__ state1 = arrays.states[1];
  auto* __restrict__ state2 = arrays.states[2];
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

// Inlined, since a call counts where tensors are short. By value, so that the coefficients stay in
// registers.
template <typename Update, int kNumStates, typename Param, typename State>
LRS_HOST_DEVICE void update_all(const Update update, const Elements& elements) {
  visit_parts(elements.range, [&](int64_t begin, auto count) {
    if (count == kPart) prefetch_ahead<Cache::kL2, kNumStates, Param, State>(elements, begin);
    const Arrays<kNumStates, Param, State> arrays(elements.tensor, begin);
    if constexpr (kRoundsAtRandom<kNumStates, Param, State>) {
      alignas(64) uint16_t random[kPart];
      fill_random(elements.random_key, begin, count, random);
      update_elements(update, arrays, count, random);
    } else {
      update_elements(update, arrays, count, nullptr);
    }
  });
}

// Updates pairs of elements with bfloat16 states.
template <typename Update, int kNumStates, typename Param>
LRS_HOST_DEVICE void update_pairs(const Update& update,
                                  const Arrays<kNumStates, Param, BFloat16State>& arrays,
                                  int32_t pairs, uint32_t key) {
  auto* __restrict__ param = arrays.param;
  const auto* __restrict__ grad = arrays.grad;
  auto* __restrict__ remainder = arrays.remainder;
  auto* __restrict__ state0 = arrays.states[0];
  auto* __restrict__ state1 = arrays.states[1];
#pragma GCC ivdep
  for (int32_t i = 0; i < pairs; ++i, key += kKeyStep) {
    const uint32_t random = random_pair(key, 0);
    const Pair gradient = load_pair(grad, i);
    const Pair old0 = load_pair(state0, i);
    const Pair old1 = kNumStates > 1 ? load_pair(state1, i) : Pair{};
    Pair value = load_param_pair<Param>(param, remainder, i);
    float even[kMaxStates] = {old0.even, old1.even}, odd[kMaxStates] = {old0.odd, old1.odd};
    update.template apply<kNumStates, StateType::kBFloat16>(value.even, gradient.even, even);
    update.template apply<kNumStates, StateType::kBFloat16>(value.odd, gradient.odd, odd);
    store_stochastic_pair(state0, i, {even[0], odd[0]}, random);
    if constexpr (kNumStates > 1) store_stochastic_pair(state1, i, {even[1], odd[1]}, random);
    store_param_pair<Param>(param, remainder, i, value, random);
  }
}

// Where the last part of a range begins, if it has an odd number of elements, or else its end.
LRS_HOST_DEVICE int64_t even_end(Range range) {
  const int64_t count = range.end - range.begin;
  return count % 2 == 0 ? range.end : range.begin + count / kPart * kPart;
}

template <typename Update, int kNumStates, typename Param>
void update_all_pairs(const Update update, const Elements& elements) {
  using PartArrays = Arrays<kNumStates, Param, BFloat16State>;
  const Range range = elements.range;
  const int64_t end = even_end(range);
  visit_parts({range.begin, end}, [&](int64_t begin, auto count) {
    prefetch_ahead<Cache::kL2, kNumStates, Param, BFloat16State>(elements, begin);
    update_pairs(update, PartArrays(elements.tensor, begin), count / 2,
                 key_from(elements.random_key, begin));
  });
  if (end < range.end) {
    const PartArrays arrays(elements.tensor, end);
    EvenCopy copy(arrays, static_cast<int32_t>(range.end - end));
    update_pairs(update, copy.arrays(), copy.count() / 2, key_from(elements.random_key, end));
    copy.write_to(arrays);
  }
}

// What is left to encode of a block of quantisation whose elements have been updated.
template <int kNumStates>
struct KeptBlock {
  alignas(64) uint16_t random[kPart];
  alignas(64) float states[kNumStates][kPart];
  uint32_t largest[kNumStates];  // the bits of the largest magnitude
};

LRS_HOST_DEVICE uint32_t larger(uint32_t bits, uint32_t other) {
  return bits > other ? bits : other;
}

// The largest of a magnitude's bits and those of a pair.
template <bool kIsRoot>
LRS_HOST_DEVICE uint32_t larger(uint32_t bits, Pair pair) {
  return larger(bits,
                larger(magnitude_bits<kIsRoot>(pair.even), magnitude_bits<kIsRoot>(pair.odd)));
}

// Updates `count` elements of a block of quantisation whose parameters are float32, of which pairs
// would have to be moved between lanes.
template <typename Update, int kNumStates>
LRS_HOST_DEVICE void update_block(
    const Update& update, const Arrays<kNumStates, NearestParam<float>, Block8State>& arrays,
    float scale0, float scale1, int32_t count, uint32_t key, KeptBlock<kNumStates>& kept) {
  constexpr bool kIsRoot1 = Update::kRootState == 1;
  auto* __restrict__ param = arrays.param;
  const auto* __restrict__ grad = arrays.grad;
  const auto* __restrict__ codes0 = arrays.states[0];
  const auto* __restrict__ codes1 = arrays.states[1];
  fill_random(key, 0, count, kept.random);
  uint32_t largest0 = 0, largest1 = 0;
#pragma GCC ivdep
  for (int32_t i = 0; i < count; ++i) {
    float value = param[i], state[kMaxStates];
    state[0] = Block8State::decode<false>(codes0[i], scale0);
    if constexpr (kNumStates > 1) state[1] = Block8State::decode<kIsRoot1>(codes1[i], scale1);
    update.template apply<kNumStates, StateType::kBlock8>(value, grad[i], state);
    param[i] = value;
    kept.states[0][i] = state[0];
    largest0 = larger(largest0, magnitude_bits<false>(state[0]));
    if constexpr (kNumStates > 1) {
      kept.states[1][i] = state[1];
      largest1 = larger(largest1, magnitude_bits<kIsRoot1>(state[1]));
    }
  }
  kept.largest[0] = largest0;
  if constexpr (kNumStates > 1) kept.largest[1] = largest1;
}

// The same by pairs. Of the states that are left to encode, the even ones come first.
template <typename Update, int kNumStates, typename Param>
LRS_HOST_DEVICE void update_block(const Update& update,
                                  const Arrays<kNumStates, Param, Block8State>& arrays,
                                  float scale0, float scale1, int32_t count, uint32_t key,
                                  KeptBlock<kNumStates>& kept) {
  constexpr bool kIsRoot1 = Update::kRootState == 1;
  auto* __restrict__ param = arrays.param;
  const auto* __restrict__ grad = arrays.grad;
  auto* __restrict__ remainder = arrays.remainder;
  const auto* __restrict__ codes0 = arrays.states[0];
  const auto* __restrict__ codes1 = arrays.states[1];
  uint32_t largest0 = 0, largest1 = 0;
#pragma GCC ivdep
  for (int32_t i = 0; i < count / 2; ++i, key += kKeyStep) {
    const uint32_t random = random_pair(key, 0);
    const Pair gradient = load_pair(grad, i);
    const Pair old0 = decode_pair<false>(codes0, i, scale0);
    const Pair old1 = kNumStates > 1 ? decode_pair<kIsRoot1>(codes1, i, scale1) : Pair{};
    Pair value = load_param_pair<Param>(param, remainder, i);
    float even[kMaxStates] = {old0.even, old1.even}, odd[kMaxStates] = {old0.odd, old1.odd};
    update.template apply<kNumStates, StateType::kBlock8>(value.even, gradient.even, even);
    update.template apply<kNumStates, StateType::kBlock8>(value.odd, gradient.odd, odd);
    store_word<uint32_t>(kept.random, i, random);
    kept.states[0][i] = even[0];
    kept.states[0][kPart / 2 + i] = odd[0];
    largest0 = larger<false>(largest0, {even[0], odd[0]});
    if constexpr (kNumStates > 1) {
      kept.states[1][i] = even[1];
      kept.states[1][kPart / 2 + i] = odd[1];
      largest1 = larger<kIsRoot1>(largest1, {even[1], odd[1]});
    }
    store_param_pair<Param>(param, remainder, i, value, random);
  }
  kept.largest[0] = largest0;
  if constexpr (kNumStates > 1) kept.largest[1] = largest1;
}

// Encodes state s of a block and writes its scale. By pairs, `count` must be even.
template <bool kIsRoot, bool kByPairs, int kNumStates>
LRS_HOST_DEVICE void encode_state(const KeptBlock<kNumStates>& kept, int s, int32_t count,
                                  uint8_t* __restrict__ codes, float& scale) {
  scale = block_scale<kIsRoot>(kept.largest[s]);
  const float factor = multiple_factor(scale);
  const float* states = kept.states[s];
  if constexpr (kByPairs) {
#pragma GCC ivdep
    for (int32_t i = 0; i < count / 2; ++i) {
      const uint32_t random = load_word<uint32_t>(kept.random, i);
      encode_pair<kIsRoot>(codes, i, {states[i], states[kPart / 2 + i]}, factor, random);
    }
  } else {
#pragma GCC ivdep
    for (int32_t i = 0; i < count; ++i) {
      codes[i] = Block8State::encode<kIsRoot>(states[i] * factor, kept.random[i]) >> 24;
    }
  }
}

// As update_all_pairs for block-quantised states: a block's scale is known only when all of it has
// been updated. Several at a time, so that none waits for the scale of the one before.
template <typename Update, int kNumStates, typename Param>
void update_blocks(const Update& update, const Elements& elements) {
  using BlockArrays = Arrays<kNumStates, Param, Block8State>;
  constexpr bool kIsRoot1 = Update::kRootState == 1;
  constexpr bool kByPairs = !std::is_same_v<typename Param::Value, float>;
  constexpr Cache kCache = kByPairs ? Cache::kL1 : Cache::kL2;
  constexpr int64_t kBatch = 4 * kQuantBlock;
  const TensorEntry& entry = *elements.tensor.entry;
  const auto update_one = [&](const BlockArrays& arrays, int64_t begin, int32_t count,
                              KeptBlock<kNumStates>& kept) {
    const int64_t block = begin / kQuantBlock;
    const float scale1 = kNumStates > 1 ? entry.scales[1][block] : 0.0f;
    const uint32_t key = key_from(elements.random_key, begin);
    update_block(update, arrays, entry.scales[0][block], scale1, count, key, kept);
  };
  const auto encode_one = [&](const BlockArrays& arrays, int64_t begin, int32_t count,
                              const KeptBlock<kNumStates>& kept) {
    const int64_t block = begin / kQuantBlock;
    encode_state<false, kByPairs>(kept, 0, count, arrays.states[0], entry.scales[0][block]);
    if constexpr (kNumStates > 1) {
      encode_state<kIsRoot1, kByPairs>(kept, 1, count, arrays.states[1], entry.scales[1][block]);
    }
  };
  KeptBlock<kNumStates> kept[kBatch / kQuantBlock];
  const Range range = elements.range;
  const int64_t end = even_end(range);
  for (int64_t batch = range.begin; batch < end; batch += kBatch) {
    const Range part{batch, batch + kBatch < end ? batch + kBatch : end};
    visit_parts(part, [&](int64_t begin, auto count) {
      prefetch_ahead<kCache, kNumStates, Param, Block8State>(elements, begin);
      update_one({elements.tensor, begin}, begin, count, kept[(begin - batch) / kQuantBlock]);
    });
    visit_parts(part, [&](int64_t begin, auto count) {
      encode_one({elements.tensor, begin}, begin, count, kept[(begin - batch) / kQuantBlock]);
    });
  }
  if (end < range.end) {
    const BlockArrays arrays(elements.tensor, end);
    EvenCopy copy(arrays, static_cast<int32_t>(range.end - end));
    update_one(copy.arrays(), end, copy.count(), kept[0]);
    encode_one(copy.arrays(), end, copy.count(), kept[0]);
    copy.write_to(arrays);
  }
}

template <typename Update, int kNumStates, typename State>
void update_params(const Update& update, const Elements& elements, bool rounds_stochastically) {
  const auto run = [&](auto param) {
    using Param = decltype(param);
    if constexpr (State::kType == StateType::kBlock8 && kNumStates > 0) {
      update_blocks<Update, kNumStates, Param>(update, elements);
    } else if constexpr (State::kType == StateType::kBFloat16 &&
                         !std::is_same_v<typename Param::Value, float>) {
      // Pairs of floats must be moved between lanes, at 10 % of the time with AVX2.
      update_all_pairs<Update, kNumStates, Param>(update, elements);
    } else {
      update_all<Update, kNumStates, Param, State>(update, elements);
    }
  };
  const TensorEntry& entry = *elements.tensor.entry;
  switch (entry.dtype) {
    case DType::kFloat32:
      return run(NearestParam<float>());
    case DType::kBFloat16:
      if (entry.remainder != nullptr) return run(SplitParam());
      if (rounds_stochastically) return run(StochasticParam());
      return run(NearestParam<BFloat16>());
    case DType::kFloat16:
      if constexpr (State::kType == StateType::kFloat32) {
        const auto update_piece = [&](const TensorEntry& piece, const void* gradient, Range range) {
          update_all<Update, kNumStates, NearestParam<float>, State>(
              update, {{&piece, gradient}, range, elements.random_key, {}});
        };
        visit_as_float32<true>(entry, elements.tensor.gradient, elements.range, update_piece);
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
  if (elements.tensor.entry->states[Update::kMaxStates - 1] != nullptr) {
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
  const auto tensor_of = [&](int64_t i) -> Tensor {
    const int64_t tensor = table.chunks[i].tensor;
    return {&table.tensors[tensor], gradients[tensor]};
  };
  for (int64_t i = first; i < last; ++i) {
    const Tensor tensor = tensor_of(i);
    if (tensor.gradient == nullptr) continue;
    const TensorEntry& entry = *tensor.entry;
    const double step = static_cast<double>(*entry.step) + 1.0;
    if (entry.group != folded_group || step != folded_step) {
      update = fold<Update>(table, entry, scale);
      folded_group = entry.group;
      folded_step = step;
    }
    const Range range = chunk_range(entry.numel, table.chunk_elements, table.chunks[i].index);
    const uint32_t key =
        is_random(table) ? random_key(*table.step, entry.position, range.begin) : 0;
    Tensor next{};
    if (range.end == entry.numel && entry.numel >= kPart && i + 1 < last) {
      const Tensor follower = tensor_of(i + 1);
      if (follower.gradient != nullptr && are_alike(entry, *follower.entry)) next = follower;
    }
    update_range(update, {tensor, range, key, next}, table);
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
