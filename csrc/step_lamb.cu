#include "lamb_cuda.cuh"

namespace lrs {

void launch_lamb(const Launch& launch, const Gradients& gradients, cudaStream_t stream) {
  const unsigned blocks = num_blocks(launch);
  if (launch.table.num_chunks > 0) {
    lamb_moments_kernel<<<blocks, kThreads, 0, stream>>>(launch, gradients);
  }
  lamb_params_kernel<<<blocks, kThreads, 0, stream>>>(launch, gradients);
  check(cudaGetLastError(), "the launch of the LAMB kernels");
}

}  // namespace lrs
