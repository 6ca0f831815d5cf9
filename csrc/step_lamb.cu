#include "lamb_cuda.cuh"

namespace lrs {

template <int kCapacity>
void launch_lamb(const Launch& launch, const Gradients<kCapacity>& gradients, cudaStream_t stream) {
  const unsigned blocks = num_blocks(launch);
  const Passes passes = launch.table.passes;
  if (passes != Passes::kParams && launch.table.num_chunks > 0) {
    lamb_moments_kernel<kCapacity><<<blocks, kThreads, 0, stream>>>(launch, gradients);
  }
  if (passes != Passes::kMoments) {
    lamb_params_kernel<kCapacity><<<blocks, kThreads, 0, stream>>>(launch, gradients);
  }
  check(cudaGetLastError(), "the launch of the LAMB kernels");
}

template void launch_lamb(const Launch&, const Gradients<kFewGradients>&, cudaStream_t);
template void launch_lamb(const Launch&, const Gradients<kManyGradients>&, cudaStream_t);

}  // namespace lrs
