#include "step_kernel.cuh"

namespace lrs {

void launch_sgd(const Launch& launch, const Gradients& gradients, cudaStream_t stream) {
  launch_update<SGD>(launch, gradients, stream);
}

}  // namespace lrs
