// LAMB on CUDA: a launch for the moments and the norms, and one for the parameters.
#pragma once

#include <type_traits>

#include "lamb.h"
#include "launch.cuh"

namespace lrs {

// Four elements make neighbouring threads touch neighbouring 16 bytes of the moments, which are
// most of the traffic.
constexpr int kLambLane = 4;

// Calls `visit` with the width of a lane and its first element, for all that is this thread's.
template <typename Visit>
__device__ __forceinline__ void visit_lanes(Range range, Range vector, const Visit& visit) {
  const std::integral_constant<int, 1> one;
  const std::integral_constant<int, kLambLane> many;
  for (int64_t i = range.begin + threadIdx.x; i < vector.begin; i += kThreads) visit(one, i);
  for (int64_t i = vector.begin + threadIdx.x * kLambLane; i < vector.end;
       i += kThreads * kLambLane) {
    visit(many, i);
  }
  for (int64_t i = vector.end + threadIdx.x; i < range.end; i += kThreads) visit(one, i);
}

__device__ __forceinline__ Squares block_sums(Squares squares) {
  return {block_sum(squares.param), block_sum(squares.direction)};
}

// Moves the moments of a chunk and returns this thread's share of the sums.
template <typename Param>
__device__ __forceinline__ Squares move_moments(const LAMB& update, const TensorEntry& entry,
                                                const void* gradient, Range range) {
  const Param* param = static_cast<const Param*>(entry.param);
  const Param* grad = static_cast<const Param*>(gradient);
  float* exp_avg = static_cast<float*>(entry.states[0]);
  float* exp_avg_sq = static_cast<float*>(entry.states[1]);
  const uint64_t addresses[4] = {
      reinterpret_cast<uint64_t>(param), reinterpret_cast<uint64_t>(grad),
      reinterpret_cast<uint64_t>(exp_avg), reinterpret_cast<uint64_t>(exp_avg_sq)};
  const int bytes[4] = {sizeof(Param), sizeof(Param), sizeof(float), sizeof(float)};
  Squares squares{};
  visit_lanes(range, vector_range(range, kLambLane, addresses, bytes), [&](auto lane, int64_t at) {
    constexpr int kLane = decltype(lane)::value;
    alignas(16) Param params[kLane];
    alignas(16) Param grads[kLane];
    alignas(16) float moments1[kLane];
    alignas(16) float moments2[kLane];
    copy_lane<kLane>(params, global(param + at));
    copy_lane<kLane>(grads, global(grad + at));
    copy_lane<kLane>(moments1, global(exp_avg + at));
    copy_lane<kLane>(moments2, global(exp_avg_sq + at));
#pragma unroll
    for (int i = 0; i < kLane; ++i) {
      const float value = load(params[i]);
      update.move_moments(load(grads[i]), moments1[i], moments2[i]);
      const double direction = update.direction(value, moments1[i], moments2[i]);
      squares.param += static_cast<double>(value) * value;
      squares.direction += direction * direction;
    }
    copy_lane<kLane>(global(exp_avg + at), moments1);
    copy_lane<kLane>(global(exp_avg_sq + at), moments2);
  });
  return squares;
}

template <typename Param>
__device__ __forceinline__ void move_params(const LAMB& update, float step_size,
                                            const TensorEntry& entry, Range range) {
  Param* param = static_cast<Param*>(entry.param);
  const float* exp_avg = static_cast<float*>(entry.states[0]);
  const float* exp_avg_sq = static_cast<float*>(entry.states[1]);
  const uint64_t addresses[3] = {reinterpret_cast<uint64_t>(param),
                                 reinterpret_cast<uint64_t>(exp_avg),
                                 reinterpret_cast<uint64_t>(exp_avg_sq)};
  const int bytes[3] = {sizeof(Param), sizeof(float), sizeof(float)};
  visit_lanes(range, vector_range(range, kLambLane, addresses, bytes), [&](auto lane, int64_t at) {
    constexpr int kLane = decltype(lane)::value;
    alignas(16) Param params[kLane];
    alignas(16) float moments1[kLane];
    alignas(16) float moments2[kLane];
    copy_lane<kLane>(params, global(param + at));
    copy_lane<kLane>(moments1, global(exp_avg + at));
    copy_lane<kLane>(moments2, global(exp_avg_sq + at));
#pragma unroll
    for (int i = 0; i < kLane; ++i) {
      const float value = load(params[i]);
      const float direction = update.direction(value, moments1[i], moments2[i]);
      store(params[i], value - step_size * direction);
    }
    copy_lane<kLane>(global(param + at), params);
  });
}

// Adds up the sums of a tensor's chunks once all are there: its block that draws the last ticket
// does it. `squares` are the sums of this block's chunk, in the first thread.
__device__ __forceinline__ void sum_tensor(const StepTable& table, Chunk chunk, int64_t num_chunks,
                                           Squares squares) {
  __shared__ bool is_last;
  uint32_t* ticket = table.ticket + 1 + chunk.tensor;
  if (threadIdx.x == 0) {
    table.chunk_squares[blockIdx.x] = squares;
    __threadfence();
    is_last = atomicAdd(ticket, 1u) == num_chunks - 1;
    __threadfence();
  }
  __syncthreads();
  if (!is_last) return;
  const Squares* first = table.chunk_squares + blockIdx.x - chunk.index;
  Squares total{};
  for (int64_t i = threadIdx.x; i < num_chunks; i += kThreads) {
    total.param += __ldcg(&first[i].param);
    total.direction += __ldcg(&first[i].direction);
  }
  total = block_sums(total);
  if (threadIdx.x == 0) {
    table.tensor_squares[chunk.tensor] = total;
    *ticket = 0;
  }
}

// One block a chunk.
template <int kCapacity>
__global__ void __launch_bounds__(kThreads, kBlocksPerSM)
    lamb_moments_kernel(const __grid_constant__ Launch launch,
                        const __grid_constant__ Gradients<kCapacity> gradients) {
  __shared__ LAMB shared_update;
  const StepTable& table = launch.table;
  if (is_skipped(table.scaling)) return;
  const Chunk chunk = chunk_of_block(launch);
  const void* gradient = gradients.at(chunk.tensor - launch.first_tensor);
  if (gradient == nullptr) return;
  const TensorEntry entry = tensor_at(launch, chunk.tensor);
  if (threadIdx.x == 0) shared_update = fold<LAMB>(table, entry, grad_scale(table.scaling));
  __syncthreads();
  const LAMB update = shared_update;
  const Range range = chunk_range(entry.numel, table.chunk_elements, chunk.index);
  Squares squares{};
  switch (entry.dtype) {
    case DType::kFloat32:
      squares = move_moments<float>(update, entry, gradient, range);
      break;
    case DType::kBFloat16:
      squares = move_moments<BFloat16>(update, entry, gradient, range);
      break;
    case DType::kFloat16:
      squares = move_moments<Float16>(update, entry, gradient, range);
      break;
  }
  const int64_t num_chunks = num_chunks_of(entry.numel, table.chunk_elements);
  sum_tensor(table, chunk, num_chunks, block_sums(squares));
}

template <int kCapacity>
__global__ void __launch_bounds__(kThreads, kBlocksPerSM)
    lamb_params_kernel(const __grid_constant__ Launch launch,
                       const __grid_constant__ Gradients<kCapacity> gradients) {
  __shared__ LAMB shared_update;
  __shared__ float shared_step_size;
  const StepTable& table = launch.table;
  if (is_skipped(table.scaling)) return;
  Chunk chunk{};
  TensorEntry entry{};
  bool has_gradient = false;
  if (blockIdx.x < table.num_chunks) {  // a launch without chunks still commits
    chunk = chunk_of_block(launch);
    has_gradient = gradients.at(chunk.tensor - launch.first_tensor) != nullptr;
  }
  if (has_gradient) {
    entry = tensor_at(launch, chunk.tensor);
    if (threadIdx.x == 0) {
      shared_update = fold<LAMB>(table, entry, grad_scale(table.scaling));
      shared_step_size = shared_update.step_size(table.tensor_squares[chunk.tensor]);
    }
  }
  __syncthreads();
  const uint32_t ticket = threadIdx.x == 0 ? draw_ticket(table.ticket) : 0;
  if (has_gradient) {
    const LAMB update = shared_update;
    const float step_size = shared_step_size;
    const Range range = chunk_range(entry.numel, table.chunk_elements, chunk.index);
    switch (entry.dtype) {
      case DType::kFloat32:
        move_params<float>(update, step_size, entry, range);
        break;
      case DType::kBFloat16:
        move_params<BFloat16>(update, step_size, entry, range);
        break;
      case DType::kFloat16:
        move_params<Float16>(update, step_size, entry, range);
        break;
    }
  }
  commit(launch, gradients, ticket);
}

}  // namespace lrs
