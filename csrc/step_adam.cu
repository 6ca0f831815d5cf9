#include "step_kernel.cuh"

namespace lrs {

template <int kCapacity>
void launch_adam(const Launch& launch, const Gradients<kCapacity>& gradients, cudaStream_t stream) {
  launch_update<Adam>(launch, gradients, stream);
}

template void launch_adam(const Launch&, const Gradients<kFewGradients>&, cudaStream_t);
template void launch_adam(const Launch&, const Gradients<kManyGradients>&, cudaStream_t);

}  // namespace lrs
