#include "step_kernel.cuh"

namespace lrs {

void launch_lion(const Launch& launch, const Gradients& gradients, cudaStream_t stream) {
  launch_update<Lion>(launch, gradients, stream);
}

}  // namespace lrs
