// The norm of all gradients on a CUDA device: one sum per block, which the last block adds up.
#include "launch.cuh"
#include "step_cuda.h"

namespace lrs {
namespace {

// The part of a thread in the sum of squares of a chunk.
template <typename Grad>
__device__ __forceinline__ double squares(const void* gradient, Range range) {
  constexpr int kLane = 16 / sizeof(Grad);
  const Grad* grad = static_cast<const Grad*>(gradient);
  const uint64_t addresses[1] = {reinterpret_cast<uint64_t>(grad)};
  const int bytes[1] = {sizeof(Grad)};
  const Range vector = vector_range(range, kLane, addresses, bytes);
  double sum = 0.0;
  const auto add = [&](Grad element) {
    const double value = load(element);
    sum += value * value;
  };
  for (int64_t i = range.begin + threadIdx.x; i < vector.begin; i += kThreads) add(grad[i]);
  for (int64_t i = vector.begin + threadIdx.x * kLane; i < vector.end; i += kThreads * kLane) {
    const uint4 bits = *reinterpret_cast<const uint4*>(grad + i);
    const Grad* lane = reinterpret_cast<const Grad*>(&bits);
#pragma unroll
    for (int k = 0; k < kLane; ++k) add(lane[k]);
  }
  for (int64_t i = vector.end + threadIdx.x; i < range.end; i += kThreads) add(grad[i]);
  return sum;
}

__device__ __forceinline__ double squares_of_dtype(DType dtype, const void* gradient, Range range) {
  switch (dtype) {
    case DType::kFloat32:
      return squares<float>(gradient, range);
    case DType::kBFloat16:
      return squares<BFloat16>(gradient, range);
    case DType::kFloat16:
      return squares<Float16>(gradient, range);
  }
  return 0.0;
}

// What a block adds up at least, if there is as much: a sum takes as long as a few thousand
// elements.
constexpr int64_t kNormElements = 16384;

// Where the blocks of a launch leave their sums, and how many chunks each of them adds up.
struct BlockSums {
  double* all;
  int64_t first, last;  // of this launch
  int64_t chunks_each;
};

// Writes the sums of the launch, and after the last launch the root of all of them to `norm`.
template <int kCapacity>
__global__ void __launch_bounds__(kThreads)
    norm_kernel(const __grid_constant__ Launch launch,
                const __grid_constant__ Gradients<kCapacity> gradients, BlockSums sums,
                float* norm) {
  const StepTable& table = launch.table;
  const Range chunks = chunk_range(table.num_chunks, sums.chunks_each, blockIdx.x);
  double sum = 0.0;
  for (int64_t i = chunks.begin; i < chunks.end; ++i) {
    const Chunk chunk = table.chunks[i];
    const void* gradient = gradients.at(chunk.tensor - launch.first_tensor);
    if (gradient == nullptr) continue;
    const TensorEntry& entry = table.tensors[chunk.tensor];
    const Range range = chunk_range(entry.numel, table.chunk_elements, chunk.index);
    sum += squares_of_dtype(entry.dtype, gradient, range);
  }
  sum = block_sum(sum);
  // A launch without chunks still has a block.
  if (threadIdx.x == 0 && chunks.begin < chunks.end) sums.all[sums.first + blockIdx.x] = sum;
  if (!is_last_block(table.ticket) || !launch.is_last) return;
  sum = 0.0;
  for (int64_t i = threadIdx.x; i < sums.last; i += kThreads) sum += __ldcg(sums.all + i);
  sum = block_sum(sum);
  if (threadIdx.x == 0) *norm = static_cast<float>(sqrt(sum));
}

template <int kCapacity>
void launch_norm(const Launch& launch, const Gradients<kCapacity>& gradients, const BlockSums& sums,
                 float* norm, cudaStream_t stream) {
  const auto blocks = static_cast<unsigned>(std::max<int64_t>(sums.last - sums.first, 1));
  norm_kernel<kCapacity><<<blocks, kThreads, 0, stream>>>(launch, gradients, sums, norm);
  check(cudaGetLastError(), "the launch of the norm kernel");
}

}  // namespace

void grad_norm_cuda(const StepTable& table, const int64_t* chunk_offsets,
                    const void* const* gradients, double* sums, float* norm, int device,
                    void* stream) {
  const DeviceScope scope(device);
  BlockSums block_sums{sums, 0, 0, std::max<int64_t>(kNormElements / table.chunk_elements, 1)};
  for_each_launch(table, chunk_offsets, gradients, [&](const Launch& launch, const auto& g) {
    const int64_t count = num_chunks_of(launch.table.num_chunks, block_sums.chunks_each);
    block_sums.first = block_sums.last;
    block_sums.last += count;
    launch_norm(launch, g, block_sums, norm, static_cast<cudaStream_t>(stream));
  });
}

}  // namespace lrs
