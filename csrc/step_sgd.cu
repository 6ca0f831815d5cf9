#include "step_kernel.cuh"

namespace lrs {

template <int kCapacity>
void launch_sgd(const Launch& launch, const Gradients<kCapacity>& gradients, cudaStream_t stream) {
  launch_update<SGD>(launch, gradients, stream);
}

template void launch_sgd(const Launch&, const Gradients<kFewGradients>&, cudaStream_t);
template void launch_sgd(const Launch&, const Gradients<kManyGradients>&, cudaStream_t);

}  // namespace lrs
