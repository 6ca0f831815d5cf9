#include "step_kernel.cuh"

namespace lrs {

void launch_adam(const Launch& launch, const Gradients& gradients, cudaStream_t stream) {
  launch_update<Adam>(launch, gradients, stream);
}

}  // namespace lrs
