// The step kernel of the CUDA backend, a template over the update and the storage of its states.
#pragma once

#include <type_traits>

#include "element_storage.h"
#include "launch.cuh"

namespace lrs {
namespace {

// The arrays of one tensor.
template <int kNumStates, typename Param, typename State>
struct Arrays {
  typename Param::Value* param;
  const typename Param::Value* grad;
  typename State::Value* states[kNumStates > 0 ? kNumStates : 1];
  float* scales[kNumStates > 0 ? kNumStates : 1];
  int16_t* remainder;

  __device__ __forceinline__ Arrays(const TensorEntry& entry, const void* gradient)
      : param(static_cast<typename Param::Value*>(entry.param)),
        grad(static_cast<const typename Param::Value*>(gradient)),
        remainder(entry.remainder) {
#pragma unroll
    for (int s = 0; s < kNumStates; ++s) {
      states[s] = static_cast<typename State::Value*>(entry.states[s]);
      scales[s] = entry.scales[s];
    }
  }

  // Of the elements in `range`, those that lanes of `lane` elements can serve.
  __device__ __forceinline__ Range vector_part(Range range, int lane) const {
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
    return vector_range(range, lane, addresses, bytes);
  }
};

// Asks for the arrays at `element`, if that is in `range`, while there is something else to do.
template <int kNumStates, typename Param, typename State>
__device__ __forceinline__ void prefetch(const Arrays<kNumStates, Param, State>& arrays,
                                         Range range, int64_t element) {
  if (element >= range.end) return;
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
  __device__ __forceinline__ void load(const Arrays& arrays, int64_t begin) {
    copy_lane<kLane>(param, global(arrays.param + begin));
    copy_lane<kLane>(grad, global(arrays.grad + begin));
    if constexpr (Param::kIsSplit) copy_lane<kLane>(remainder, global(arrays.remainder + begin));
  }
  template <typename Arrays>
  __device__ __forceinline__ void store(const Arrays& arrays, int64_t begin) const {
    copy_lane<kLane>(global(arrays.param + begin), param);
    if constexpr (Param::kIsSplit) copy_lane<kLane>(global(arrays.remainder + begin), remainder);
  }

  template <int kNumStates, bool kKeepsRoot = false, typename Update>
  __device__ __forceinline__ void apply(const Update& update, int i, float* state,
                                        uint32_t random) {
    float value = Param::load(param[i], remainder[i]);
    update.template apply<kNumStates, kKeepsRoot>(value, lrs::load(grad[i]), state);
    Param::store(param[i], remainder[i], value, random & 0xffffu);
  }
};

// The widest array takes 16 bytes a lane: neighbouring threads touch neighbouring 16 bytes.
template <int kNumStates, typename Param, typename State>
__host__ __device__ constexpr int lane_of() {
  constexpr int kParam = sizeof(typename Param::Value);
  constexpr int kState = kNumStates > 0 ? sizeof(typename State::Value) : 0;
  return 16 / (kState > kParam ? kState : kParam);
}

// Updates kLane elements from `begin` on.
template <int kLane, int kNumStates, typename State, typename Param, typename Update>
__device__ __forceinline__ void update_lane(const Update& update,
                                            const Arrays<kNumStates, Param, State>& arrays,
                                            int64_t begin, uint32_t key) {
  constexpr int kRegisterStates = kNumStates > 0 ? kNumStates : 1;
  ParamLane<kLane, Param> lane;
  alignas(16) typename State::Value state_lanes[kRegisterStates][kLane];
  lane.load(arrays, begin);
#pragma unroll
  for (int s = 0; s < kNumStates; ++s) {
    copy_lane<kLane>(state_lanes[s], global(arrays.states[s] + begin));
  }
#pragma unroll
  for (int i = 0; i < kLane; ++i) {
    uint32_t random = 0;
    if constexpr (Param::kIsRandom || (State::kIsRandom && kNumStates > 0)) {
      random = random_bits(key, static_cast<uint32_t>(begin) + i);
    }
    float state[kMaxStates];
#pragma unroll
    for (int s = 0; s < kNumStates; ++s) state[s] = load(state_lanes[s][i]);
    lane.template apply<kNumStates>(update, i, state, random);
#pragma unroll
    for (int s = 0; s < kNumStates; ++s) {
      // More states than that are float32, which needs no random bits.
      const uint32_t share = s < kMaxCompressedStates ? state_random(random, s) : 0;
      State::store(state_lanes[s][i], state[s], share);
    }
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
  const Arrays<kNumStates, Param, State> arrays(entry, gradient);
  const Range vector = arrays.vector_part(range, kLane);
  for (int64_t i = vector.begin + threadIdx.x * kLane; i < vector.end; i += kThreads * kLane) {
    prefetch(arrays, vector, i + kThreads * kLane);
    update_lane<kLane, kNumStates>(update, arrays, i, key);
  }
  const int64_t head = vector.begin - range.begin;
  const int64_t rest = head + range.end - vector.end;
  for (int64_t i = threadIdx.x; i < rest; i += kThreads) {
    update_lane<1, kNumStates>(update, arrays, i < head ? range.begin + i : vector.end + i - head,
                               key);
  }
}

__device__ __forceinline__ uint32_t warp_max(uint32_t value) {
#pragma unroll
  for (int distance = kWarp / 2; distance > 0; distance /= 2) {
    const uint32_t other = __shfl_xor_sync(0xffffffffu, value, distance);
    value = other > value ? other : value;
  }
  return value;
}

// Encodes the elements of one state that a warp holds, and writes the scale of their block.
template <bool kIsRoot, int kElements>
__device__ __forceinline__ void encode(const float (&state)[kElements],
                                       const uint32_t (&random)[kElements], int index,
                                       uint8_t (&codes)[kElements], float* scale) {
  uint32_t largest = 0;
#pragma unroll
  for (int i = 0; i < kElements; ++i) {
    const uint32_t magnitude = to_bits(state[i]) & 0x7fffffffu;
    largest = magnitude > largest ? magnitude : largest;
  }
  const float block = block_scale(warp_max(largest));
  const float factor = share_factor(block);
#pragma unroll
  for (int i = 0; i < kElements; ++i) {
    codes[i] = Block8State::encode<kIsRoot>(state[i] * factor, state_random(random[i], index));
  }
  if (threadIdx.x % kWarp == 0) *scale = block;
}

// Updates a block of quantisation by one warp: four elements a thread, neighbours where kVector,
// else a warp apart, of which the first `count` exist.
template <bool kVector, int kNumStates, typename Param, typename Update>
__device__ __forceinline__ void update_block(const Update& update,
                                             const Arrays<kNumStates, Param, Block8State>& arrays,
                                             int64_t begin, int count, uint32_t key) {
  constexpr int kElements = kQuantBlock / kWarp;
  constexpr bool kIsRoot1 = Update::kRootState == 1;
  const int thread = threadIdx.x % kWarp;
  const int64_t block = begin / kQuantBlock;
  ParamLane<kElements, Param> lane;
  alignas(16) uint8_t codes[kNumStates][kElements];
  if constexpr (kVector) {
    lane.load(arrays, begin + thread * kElements);
#pragma unroll
    for (int s = 0; s < kNumStates; ++s) {
      copy_lane<kElements>(codes[s], global(arrays.states[s] + begin + thread * kElements));
    }
  }
  float states[kNumStates][kElements];
  uint32_t random[kElements];
  float scales[kNumStates];
#pragma unroll
  for (int s = 0; s < kNumStates; ++s) scales[s] = global(arrays.scales[s])[block];
#pragma unroll
  for (int i = 0; i < kElements; ++i) {
    const int element = kVector ? thread * kElements + i : i * kWarp + thread;
    const int64_t position = begin + element;
    random[i] = random_bits(key, static_cast<uint32_t>(position));
#pragma unroll
    for (int s = 0; s < kNumStates; ++s) states[s][i] = 0.0f;
    if (element >= count) continue;
    if constexpr (!kVector) {
      lane.param[i] = arrays.param[position];
      lane.grad[i] = arrays.grad[position];
      if constexpr (Param::kIsSplit) lane.remainder[i] = arrays.remainder[position];
#pragma unroll
      for (int s = 0; s < kNumStates; ++s) codes[s][i] = arrays.states[s][position];
    }
    float state[kMaxStates];
    state[0] = Block8State::decode<false>(codes[0][i], scales[0]);
    if constexpr (kNumStates > 1) state[1] = Block8State::decode<kIsRoot1>(codes[1][i], scales[1]);
    lane.template apply<kNumStates, kIsRoot1>(update, i, state, random[i]);
#pragma unroll
    for (int s = 0; s < kNumStates; ++s) states[s][i] = state[s];
  }
  encode<false>(states[0], random, 0, codes[0], arrays.scales[0] + block);
  if constexpr (kNumStates > 1) {
    encode<kIsRoot1>(states[1], random, 1, codes[1], arrays.scales[1] + block);
  }
  if constexpr (kVector) {
    lane.store(arrays, begin + thread * kElements);
#pragma unroll
    for (int s = 0; s < kNumStates; ++s) {
      copy_lane<kElements>(global(arrays.states[s] + begin + thread * kElements), codes[s]);
    }
  } else {
#pragma unroll
    for (int i = 0; i < kElements; ++i) {
      const int element = i * kWarp + thread;
      const int64_t position = begin + element;
      if (element >= count) continue;
      arrays.param[position] = lane.param[i];
      if constexpr (Param::kIsSplit) arrays.remainder[position] = lane.remainder[i];
#pragma unroll
      for (int s = 0; s < kNumStates; ++s) arrays.states[s][position] = codes[s][i];
    }
  }
}

// As update_elements for block-quantised states. A chunk is a whole number of blocks.
template <int kNumStates, typename Param, typename Update>
__device__ __forceinline__ void update_blocks(const Update& update, const TensorEntry& entry,
                                              const void* gradient, Range range, uint32_t key) {
  const Arrays<kNumStates, Param, Block8State> arrays(entry, gradient);
  const bool is_aligned = arrays.vector_part(range, kQuantBlock / kWarp).begin == range.begin;
  const int64_t first = range.begin + threadIdx.x / kWarp * kQuantBlock;
  for (int64_t begin = first; begin < range.end; begin += kThreads / kWarp * kQuantBlock) {
    const int64_t thread = (kThreads + threadIdx.x % kWarp) * (kQuantBlock / kWarp);
    prefetch(arrays, range, begin + thread);
    if (is_aligned && range.end - begin >= kQuantBlock) {
      update_block<true, kNumStates>(update, arrays, begin, kQuantBlock, key);
    } else {
      const int64_t left = range.end - begin;
      const int count = static_cast<int>(left < kQuantBlock ? left : kQuantBlock);
      update_block<false, kNumStates>(update, arrays, begin, count, key);
    }
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
  if (entry.dtype == DType::kFloat32) {
    using Param = NearestParam<float>;
    const Arrays<kNumStates, Param, State> arrays(entry, gradient);
    prefetch(arrays, range, range.begin + threadIdx.x * lane_of<kNumStates, Param, State>());
  } else {
    using Param = NearestParam<BFloat16>;  // or any other of two bytes
    const Arrays<kNumStates, Param, State> arrays(entry, gradient);
    prefetch(arrays, range, range.begin + threadIdx.x * lane_of<kNumStates, Param, State>());
  }
}

template <typename Update, typename State>
__global__ void __launch_bounds__(kThreads, kBlocksPerSM)
    step_kernel(const __grid_constant__ Launch launch,
                const __grid_constant__ Gradients gradients) {
  __shared__ Update shared_update;
  __shared__ uint32_t shared_key;
  const StepTable& table = launch.table;
  if (is_skipped(table.scaling)) return;
  Chunk chunk{};
  TensorEntry entry{};
  const void* gradient = nullptr;
  if (blockIdx.x < table.num_chunks) {  // a launch without chunks still commits
    chunk = table.chunks[blockIdx.x];
    gradient = gradients.address[chunk.tensor - launch.first_tensor];
  }
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 1000
  // The compiler for these then needs fewer registers, for older ones more.
  if (gradient == nullptr) {
    return commit(launch, gradients, threadIdx.x == 0 ? draw_ticket(table.ticket) : 0);
  }
#endif
  Range range{};
  if (gradient != nullptr) {
    entry = table.tensors[chunk.tensor];
    range = chunk_range(entry.numel, table.chunk_elements, chunk.index);
    prefetch_first<Update::kMinStates, State>(entry, gradient, range);
    if (threadIdx.x == 0) {
      shared_update = fold<Update>(table, entry, grad_scale(table.scaling));
      shared_key = is_random(table) ? random_key(*table.step, entry.position, range.begin) : 0;
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

template <typename Update>
void launch_update(const Launch& launch, const Gradients& gradients, cudaStream_t stream) {
  const unsigned blocks = num_blocks(launch);
  switch (launch.table.state_type) {
    case StateType::kFloat32:
      step_kernel<Update, Float32State><<<blocks, kThreads, 0, stream>>>(launch, gradients);
      break;
    case StateType::kBFloat16:
      step_kernel<Update, BFloat16State><<<blocks, kThreads, 0, stream>>>(launch, gradients);
      break;
    case StateType::kBlock8:
      step_kernel<Update, Block8State><<<blocks, kThreads, 0, stream>>>(launch, gradients);
      break;
  }
  check(cudaGetLastError(), "the launch of the step kernel");
}

}  // namespace
}  // namespace lrs
