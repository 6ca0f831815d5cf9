#include "lamb_cuda.cuh"

namespace lrs {

void launch_lamb(const Launch& launch, const Gradients& gradients, cudaStream_t stream) {
  const unsigned blocks = num_blocks(launch);
  const Passes passes = launch.table.passes;
  if (passes != Passes::kParams && launch.table.num_chunks > 0) {
    lamb_moments_kernel<<<blocks, kThreads, 0, stream>>>(launch, gradients);
  }
  if (passes != Passes::kMoments) {
    lamb_params_kernel<<<blocks, kThreads, 0, stream>>>(launch, gradients);
  }
  check(cudaGetLastError(), "the launch of the LAMB kernels");
}

}  // namespace lrs
