// The step kernel of the CUDA backend, a template over the update and the storage of its states.
#pragma once

#include <type_traits>

#include "element_storage.h"
#include "launch.cuh"

namespace lrs {
namespace {

// The arrays of one chunk, from its first element on: 32 bits then hold the place of an element,
// which takes a quarter of the instructions for addresses.
template <int kNumStates, typename Param, typename State>
struct Arrays {
  typename Param::Value* param;
  const typename Param::Value* grad;
  typename State::Value* states[kNumStates > 0 ? kNumStates : 1];
  float* scales[kNumStates > 0 ? kNumStates : 1];
  int16_t* remainder;

  __device__ __forceinline__ Arrays(const TensorEntry& entry, const void* gradient, int64_t begin)
      : param(static_cast<typename Param::Value*>(entry.param) + begin),
        grad(static_cast<const typename Param::Value*>(gradient) + begin),
        remainder(entry.remainder + begin) {
#pragma unroll
    for (int s = 0; s < kNumStates; ++s) {
      states[s] = static_cast<typename State::Value*>(entry.states[s]) + begin;
      scales[s] = entry.scales[s] + begin / kQuantBlock;
    }
  }

  // Moves on by `elements`, and by `blocks` of quantisation.
  __device__ __forceinline__ void advance(int elements, int blocks) {
    param += elements;
    grad += elements;
    if constexpr (Param::kIsSplit) remainder += elements;
#pragma unroll
    for (int s = 0; s < kNumStates; ++s) {
      states[s] += elements;
      scales[s] += blocks;
    }
  }

  // Of the first `count` elements, those that lanes of `lane` elements can serve.
  __device__ __forceinline__ Range vector_part(int count, int lane) const {
    constexpr int kArrays = 2 + kNumStates + (Param::kIsSplit ? 1 : 0);
    uint64_t addresses[kArrays];
    int bytes[kArrays];
    addresses[0] = reinterpret_cast<uint64_t>(param);
    addresses[1] = reinterpret_cast<uint64_t>(grad);
    bytes[0] = bytes[1] = sizeof(typename Param::Value);
#pragma unroll
    for (int s = 0; s < kNumStates; ++s) {
      addresses[2 + s] = reinterpret_cast<uint64_t>(states[s]);
      bytes[2 + s] = sizeof(typename State::Value);
    }
    if constexpr (Param::kIsSplit) {
      addresses[2 + kNumStates] = reinterpret_cast<uint64_t>(remainder);
      bytes[2 + kNumStates] = sizeof(int16_t);
    }
    const Range vector = vector_range({0, count}, lane, addresses, bytes);
    // Random bits are drawn for two elements at once.
    if (kRoundsAtRandom<kNumStates, Param, State> && vector.begin % 2 != 0) return {count, count};
    return vector;
  }
};

// Asks for the arrays at `element`, if that is before `end`, while there is something else to do.
template <int kNumStates, typename Param, typename State>
__device__ __forceinline__ void prefetch(const Arrays<kNumStates, Param, State>& arrays,
                                         int element, int end) {
  if (element >= end) return;
  prefetch_line(arrays.param + element);
  prefetch_line(arrays.grad + element);
  if constexpr (Param::kIsSplit) prefetch_line(arrays.remainder + element);
#pragma unroll
  for (int s = 0; s < kNumStates; ++s) prefetch_line(arrays.states[s] + element);
}

// A parameter and its gradient in registers, kLane elements each.
template <int kLane, typename Param>
struct ParamLane {
  alignas(16) typename Param::Value param[kLane];
  alignas(16) typename Param::Value grad[kLane];
  alignas(16) int16_t remainder[kLane];

  template <typename Arrays>
  __device__ __forceinline__ void load(const Arrays& arrays, int begin) {
    copy_lane<kLane>(param, global(arrays.param + begin));
    copy_lane<kLane>(grad, global(arrays.grad + begin));
    if constexpr (Param::kIsSplit) copy_lane<kLane>(remainder, global(arrays.remainder + begin));
  }
  template <typename Arrays>
  __device__ __forceinline__ void store(const Arrays& arrays, int begin) const {
    copy_lane<kLane>(global(arrays.param + begin), param);
    if constexpr (Param::kIsSplit) copy_lane<kLane>(global(arrays.remainder + begin), remainder);
  }

  template <int kNumStates, StateType kStateType, typename Update>
  __device__ __forceinline__ void apply(const Update& update, int i, float* state,
                                        uint32_t random) {
    float value = Param::load(param[i], remainder[i]);
    update.template apply<kNumStates, kStateType>(value, lrs::load(grad[i]), state);
    Param::store(param[i], remainder[i], value, random);
  }
};

// The widest array takes 16 bytes a lane: neighbouring threads touch neighbouring 16 bytes.
template <int kNumStates, typename Param, typename State>
__host__ __device__ constexpr int lane_of() {
  constexpr int kParam = sizeof(typename Param::Value);
  constexpr int kState = kNumStates > 0 ? sizeof(typename State::Value) : 0;
  return 16 / (kState > kParam ? kState : kParam);
}

// Draws random bits for two elements, the first of which is even.
__device__ __forceinline__ void draw(uint32_t& even, uint32_t& odd, uint32_t key, int element) {
  const uint32_t pair = random_pair(key, static_cast<uint32_t>(element) / 2);
  even = pair & 0xffffu;
  odd = pair >> 16;
}

// Updates kLane elements of a chunk from `begin` on; `key` counts from the chunk's first.
template <int kLane, int kNumStates, typename State, typename Param, typename Update>
__device__ __forceinline__ void update_lane(const Update& update,
                                            const Arrays<kNumStates, Param, State>& arrays,
                                            int begin, uint32_t key) {
  constexpr int kRegisterStates = kNumStates > 0 ? kNumStates : 1;
  ParamLane<kLane, Param> lane;
  alignas(16) typename State::Value state_lanes[kRegisterStates][kLane];
  lane.load(arrays, begin);
#pragma unroll
  for (int s = 0; s < kNumStates; ++s) {
    copy_lane<kLane>(state_lanes[s], global(arrays.states[s] + begin));
  }
  uint32_t random[kLane] = {};
#pragma unroll
  for (int i = 0; i < kLane; ++i) {
    if constexpr (kRoundsAtRandom<kNumStates, Param, State>) {
      if constexpr (kLane == 1) {
        random[i] = random_bits(key, begin);
      } else if (i % 2 == 0) {
        draw(random[i], random[i + 1], key, begin + i);
      }
    }
    float state[kMaxStates];
#pragma unroll
    for (int s = 0; s < kNumStates; ++s) state[s] = load(state_lanes[s][i]);
    lane.template apply<kNumStates, State::kType>(update, i, state, random[i]);
#pragma unroll
    for (int s = 0; s < kNumStates; ++s) State::store(state_lanes[s][i], state[s], random[i]);
  }
  lane.store(arrays, begin);
#pragma unroll
  for (int s = 0; s < kNumStates; ++s) {
    copy_lane<kLane>(global(arrays.states[s] + begin), state_lanes[s]);
  }
}

template <int kNumStates, typename Param, typename State, typename Update>
__device__ __forceinline__ void update_elements(const Update& update, const TensorEntry& entry,
                                                const void* gradient, Range range, uint32_t key) {
  constexpr int kLane = lane_of<kNumStates, Param, State>();
  const Arrays<kNumStates, Param, State> arrays(entry, gradient, range.begin);
  const int count = static_cast<int>(range.end - range.begin);
  const Range vector = arrays.vector_part(count, kLane);
  const int head = static_cast<int>(vector.begin), vector_end = static_cast<int>(vector.end);
#pragma unroll 1
  for (int i = head + threadIdx.x * kLane; i < vector_end; i += kThreads * kLane) {
    // With one state of two bytes there are no registers left for more addresses.
    if constexpr (kNumStates != 1 || State::kType == StateType::kFloat32) {
      prefetch(arrays, i + kThreads * kLane, vector_end);
    }
    update_lane<kLane, kNumStates>(update, arrays, i, key);
  }
  const int rest = head + count - vector_end;
#pragma unroll 1
  for (int i = threadIdx.x; i < rest; i += kThreads) {
    update_lane<1, kNumStates>(update, arrays, i < head ? i : vector_end + i - head, key);
  }
}

// What one thread has of a block of quantisation: codes lie in a word.
constexpr int kElements = kQuantBlock / kWarp;
static_assert(kElements == 4);

__device__ __forceinline__ uint32_t top_bytes(const uint32_t (&words)[kElements]) {
  const uint32_t low = __byte_perm(words[0], words[1], 0x73);
  const uint32_t high = __byte_perm(words[2], words[3], 0x73);
  return __byte_perm(low, high, 0x5410);
}

template <bool kIsRoot>
__device__ __forceinline__ void decode(uint32_t word, float scale, float (&state)[kElements]) {
  state[0] = Block8State::decode<kIsRoot, 0>(word, scale);
  state[1] = Block8State::decode<kIsRoot, 1>(word, scale);
  state[2] = Block8State::decode<kIsRoot, 2>(word, scale);
  state[3] = Block8State::decode<kIsRoot, 3>(word, scale);
}

// Encodes the elements of one state that a warp holds, and writes the scale of their block.
template <bool kIsRoot>
__device__ __forceinline__ uint32_t encode(const float (&state)[kElements],
                                           const uint32_t (&random)[kElements], float* scale) {
  uint32_t largest = 0;
#pragma unroll
  for (int i = 0; i < kElements; ++i) {
    const uint32_t magnitude = magnitude_bits<kIsRoot>(state[i]);
    largest = magnitude > largest ? magnitude : largest;
  }
  const float block = block_scale<kIsRoot>(__reduce_max_sync(0xffffffffu, largest));
  const float factor = multiple_factor(block);
  if (threadIdx.x % kWarp == 0) *scale = block;
  uint32_t codes[kElements];
#pragma unroll
  for (int i = 0; i < kElements; ++i) {
    codes[i] = Block8State::encode<kIsRoot>(state[i] * factor, random[i]);
  }
  return top_bytes(codes);
}

// Updates a block of quantisation by one warp, four elements a thread: neighbours where kVector, or
// else a warp apart, of which the first `count` of the block exist. `arrays` and `key` count from
// the thread's first element, or else from the block's.
template <bool kVector, int kNumStates, typename Param, typename Update>
__device__ __forceinline__ void update_block(const Update& update,
                                             const Arrays<kNumStates, Param, Block8State>& arrays,
                                             int count, uint32_t key) {
  constexpr bool kIsRoot1 = Update::kRootState == 1;
  const int thread = threadIdx.x % kWarp;
  ParamLane<kElements, Param> lane;
  uint32_t codes[kNumStates];
  if constexpr (kVector) {
    lane.load(arrays, 0);
#pragma unroll
    for (int s = 0; s < kNumStates; ++s) {
      codes[s] = *reinterpret_cast<const uint32_t*>(global(arrays.states[s]));
    }
  } else {
#pragma unroll
    for (int s = 0; s < kNumStates; ++s) codes[s] = 0;
#pragma unroll
    for (int i = 0; i < kElements; ++i) {
      const int element = thread + i * kWarp;
      lane.param[i] = lane.grad[i] = typename Param::Value{};
      lane.remainder[i] = 0;
      if (element >= count) continue;
      lane.param[i] = arrays.param[element];
      lane.grad[i] = arrays.grad[element];
      if constexpr (Param::kIsSplit) lane.remainder[i] = arrays.remainder[element];
#pragma unroll
      for (int s = 0; s < kNumStates; ++s) {
        codes[s] |= uint32_t{arrays.states[s][element]} << (8 * i);
      }
    }
  }
  float states[kNumStates][kElements];
  uint32_t random[kElements];
  decode<false>(codes[0], *global(arrays.scales[0]), states[0]);
  if constexpr (kNumStates > 1) decode<kIsRoot1>(codes[1], *global(arrays.scales[1]), states[1]);
#pragma unroll
  for (int i = 0; i < kElements; ++i) {
    if constexpr (!kVector) {
      // All of a thread's elements are even, or all odd.
      const uint32_t pair = random_pair(key, thread / 2 + i * (kWarp / 2));
      random[i] = pair >> (thread % 2 * 16) & 0xffffu;
    } else if (i % 2 == 0) {
      draw(random[i], random[i + 1], key, i);
    }
    float state[kMaxStates];
#pragma unroll
    for (int s = 0; s < kNumStates; ++s) state[s] = states[s][i];
    lane.template apply<kNumStates, StateType::kBlock8>(update, i, state, random[i]);
    const bool exists = kVector || thread + i * kWarp < count;
#pragma unroll
    for (int s = 0; s < kNumStates; ++s) states[s][i] = exists ? state[s] : 0.0f;
  }
  codes[0] = encode<false>(states[0], random, global(arrays.scales[0]));
  if constexpr (kNumStates > 1) {
    codes[1] = encode<kIsRoot1>(states[1], random, global(arrays.scales[1]));
  }
  if constexpr (kVector) {
    lane.store(arrays, 0);
#pragma unroll
    for (int s = 0; s < kNumStates; ++s) {
      *reinterpret_cast<uint32_t*>(global(arrays.states[s])) = codes[s];
    }
  } else {
#pragma unroll
    for (int i = 0; i < kElements; ++i) {
      const int element = thread + i * kWarp;
      if (element >= count) continue;
      arrays.param[element] = lane.param[i];
      if constexpr (Param::kIsSplit) arrays.remainder[element] = lane.remainder[i];
#pragma unroll
      for (int s = 0; s < kNumStates; ++s) {
        arrays.states[s][element] = static_cast<uint8_t>(codes[s] >> (8 * i));
      }
    }
  }
}

// As update_elements for block-quantised states. A chunk is a whole number of blocks.
template <int kNumStates, typename Param, typename Update>
__device__ __forceinline__ void update_blocks(const Update& update, const TensorEntry& entry,
                                              const void* gradient, Range range, uint32_t key) {
  constexpr int kStride = kThreads / kWarp * kQuantBlock;
  Arrays<kNumStates, Param, Block8State> arrays(entry, gradient, range.begin);
  const int count = static_cast<int>(range.end - range.begin);
  const bool is_aligned = arrays.vector_part(count, kElements).begin == 0;
  const int begin = threadIdx.x / kWarp * kQuantBlock;
  const int mine = threadIdx.x % kWarp * kElements;
  int left = count - begin;
  // Addresses that move on take a fraction of the instructions of those that are computed.
  arrays.advance(begin + mine, begin / kQuantBlock);
  key = key_from(key, begin + mine);
#pragma unroll 1
  for (; is_aligned && left >= kQuantBlock; left -= kStride) {
    prefetch(arrays, kStride, left - kQuantBlock + 1);
    update_block<true, kNumStates>(update, arrays, kQuantBlock, key);
    arrays.advance(kStride, kStride / kQuantBlock);
    key = key_from(key, kStride);
  }
  arrays.advance(-mine, 0);
  key = key_from(key, -mine);
#pragma unroll 1
  for (; left > 0; left -= kStride) {
    prefetch(arrays, kStride + mine, left);
    update_block<false, kNumStates>(update, arrays, left, key);
    arrays.advance(kStride, kStride / kQuantBlock);
    key = key_from(key, kStride);
  }
}

template <int kNumStates, typename State, typename Update>
__device__ __forceinline__ void update_chunk(const Update& update, const TensorEntry& entry,
                                             const void* gradient, Range range, uint32_t key,
                                             bool rounds_stochastically) {
  const auto run = [&](auto param) {
    using Param = decltype(param);
    if constexpr (State::kType == StateType::kBlock8 && kNumStates > 0) {
      update_blocks<kNumStates, Param>(update, entry, gradient, range, key);
    } else {
      using Kept = std::conditional_t<(kNumStates > 0), State, Float32State>;
      update_elements<kNumStates, Param, Kept>(update, entry, gradient, range, key);
    }
  };
  switch (entry.dtype) {
    case DType::kFloat32:
      return run(NearestParam<float>());
    case DType::kBFloat16:
      if (entry.remainder != nullptr) return run(SplitParam());
      if (rounds_stochastically) return run(StochasticParam());
      return run(NearestParam<BFloat16>());
    case DType::kFloat16:
      if constexpr (State::kType == StateType::kFloat32) return run(NearestParam<Float16>());
  }
}

// Asks for what a thread reads first of a chunk, whatever the parameter's dtype.
template <int kNumStates, typename State>
__device__ __forceinline__ void prefetch_first(const TensorEntry& entry, const void* gradient,
                                               Range range) {
  const int count = static_cast<int>(range.end - range.begin);
  if (entry.dtype == DType::kFloat32) {
    using Param = NearestParam<float>;
    const Arrays<kNumStates, Param, State> arrays(entry, gradient, range.begin);
    prefetch(arrays, threadIdx.x * lane_of<kNumStates, Param, State>(), count);
  } else {
    using Param = NearestParam<BFloat16>;  // or any other of two bytes
    const Arrays<kNumStates, Param, State> arrays(entry, gradient, range.begin);
    prefetch(arrays, threadIdx.x * lane_of<kNumStates, Param, State>(), count);
  }
}

template <typename Update, typename State, int kCapacity>
__global__ void __launch_bounds__(kThreads, kBlocksPerSM)
    step_kernel(const __grid_constant__ Launch launch,
                const __grid_constant__ Gradients<kCapacity> gradients) {
  __shared__ Update shared_update;
  __shared__ uint32_t shared_key;
  const StepTable& table = launch.table;
  if (is_skipped(table.scaling)) return;
  Chunk chunk{};
  TensorEntry entry{};
  const void* gradient = nullptr;
  if (blockIdx.x < table.num_chunks) {  // a launch without chunks still commits
    chunk = chunk_of_block(launch);
    gradient = gradients.at(chunk.tensor - launch.first_tensor);
  }
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 1000
  // The compiler for these then needs fewer registers; for older ones and more states, more.
  if (Update::kMaxStates == 1 && gradient == nullptr) {
    return commit(launch, gradients, threadIdx.x == 0 ? draw_ticket(table.ticket) : 0);
  }
#endif
  Range range{};
  if (gradient != nullptr) {
    entry = tensor_at(launch, chunk.tensor);
    range = chunk_range(entry.numel, table.chunk_elements, chunk.index);
    prefetch_first<Update::kMinStates, State>(entry, gradient, range);
    if (threadIdx.x == 0) {
      shared_update = fold<Update>(table, entry, grad_scale(table.scaling));
      if (is_random(table)) {
        const uint32_t key = random_key(*table.step, entry.position, range.begin);
        shared_key = key_from(key, range.begin);
      }
    }
  }
  __syncthreads();
  // Early: the answer comes while the elements are moved.
  const uint32_t ticket = threadIdx.x == 0 ? draw_ticket(table.ticket) : 0;
  if (gradient != nullptr) {
    const Update update = shared_update;
    const uint32_t key = shared_key;
    const bool stochastic = table.rounds_stochastically;
    if (entry.states[Update::kMaxStates - 1] == nullptr) {
      update_chunk<Update::kMinStates, State>(update, entry, gradient, range, key, stochastic);
    } else if constexpr (Update::kMaxStates <= kMaxCompressedStates) {
      update_chunk<Update::kMaxStates, State>(update, entry, gradient, range, key, stochastic);
    } else if constexpr (State::kType == StateType::kFloat32) {
      update_chunk<Update::kMaxStates, State>(update, entry, gradient, range, key, stochastic);
    }
  }
  commit(launch, gradients, ticket);
}

template <typename Update, int kCapacity>
void launch_update(const Launch& launch, const Gradients<kCapacity>& gradients,
                   cudaStream_t stream) {
  const unsigned blocks = num_blocks(launch);
  switch (launch.table.state_type) {
    case StateType::kFloat32:
      step_kernel<Update, Float32State, kCapacity>
          <<<blocks, kThreads, 0, stream>>>(launch, gradients);
      break;
    case StateType::kBFloat16:
      step_kernel<Update, BFloat16State, kCapacity>
          <<<blocks, kThreads, 0, stream>>>(launch, gradients);
      break;
    case StateType::kBlock8:
      step_kernel<Update, Block8State, kCapacity>
          <<<blocks, kThreads, 0, stream>>>(launch, gradients);
      break;
  }
  check(cudaGetLastError(), "the launch of the step kernel");
}

}  // namespace
}  // namespace lrs
