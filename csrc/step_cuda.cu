// The CUDA backend: one launch updates every tensor of every group and commits the step; LAMB takes
// two.
#include <algorithm>

#include "launch.cuh"
#include "step_cuda.h"

namespace lrs {

// One file each: they take long to compile.
template <int kCapacity>
void launch_sgd(const Launch& launch, const Gradients<kCapacity>& gradients, cudaStream_t stream);
template <int kCapacity>
void launch_adam(const Launch& launch, const Gradients<kCapacity>& gradients, cudaStream_t stream);
template <int kCapacity>
void launch_lion(const Launch& launch, const Gradients<kCapacity>& gradients, cudaStream_t stream);
template <int kCapacity>
void launch_lamb(const Launch& launch, const Gradients<kCapacity>& gradients, cudaStream_t stream);

namespace {

__global__ void fill_schedule_kernel(ScheduleSpec schedule, int64_t count, float* values) {
  const int64_t stride = static_cast<int64_t>(gridDim.x) * blockDim.x;
  for (int64_t i = blockIdx.x * static_cast<int64_t>(blockDim.x) + threadIdx.x; i < count;
       i += stride) {
    values[i] = static_cast<float>(schedule_value(schedule, i));
  }
}

__global__ void write_group_kernel(Group* target, Group group) { *target = group; }

template <int kCapacity>
void launch_step(const Launch& launch, const Gradients<kCapacity>& gradients, cudaStream_t stream) {
  switch (launch.table.algorithm) {
    case Algorithm::kSGD:
      return launch_sgd(launch, gradients, stream);
    case Algorithm::kAdam:
      return launch_adam(launch, gradients, stream);
    case Algorithm::kLion:
      return launch_lion(launch, gradients, stream);
    case Algorithm::kLAMB:
      return launch_lamb(launch, gradients, stream);
  }
}

}  // namespace

void step_cuda(const StepTable& table, const int64_t* chunk_offsets, const void* const* gradients,
               int device, void* stream) {
  const auto has_gradient = [](const void* gradient) { return gradient != nullptr; };
  if (std::none_of(gradients, gradients + table.num_tensors, has_gradient)) return;
  const DeviceScope scope(device);
  for_each_launch(table, chunk_offsets, gradients, [&](const Launch& launch, const auto& g) {
    launch_step(launch, g, static_cast<cudaStream_t>(stream));
  });
}

void fill_schedule_cuda(const ScheduleSpec& schedule, int64_t count, float* values, int device,
                        void* stream) {
  if (count == 0) return;
  const DeviceScope scope(device);
  const auto blocks = static_cast<unsigned>(std::min<int64_t>((count + 255) / 256, 4096));
  fill_schedule_kernel<<<blocks, 256, 0, static_cast<cudaStream_t>(stream)>>>(schedule, count,
                                                                              values);
  check(cudaGetLastError(), "the launch of the schedule fill");
}

void write_group_cuda(Group* target, const Group& group, int device, void* stream) {
  const DeviceScope scope(device);
  write_group_kernel<<<1, 1, 0, static_cast<cudaStream_t>(stream)>>>(target, group);
  check(cudaGetLastError(), "the launch of the group write");
}

double memory_bandwidth(int device) {
  int kilohertz = 0, bits = 0;
  cudaDeviceGetAttribute(&kilohertz, cudaDevAttrMemoryClockRate, device);
  cudaDeviceGetAttribute(&bits, cudaDevAttrGlobalMemoryBusWidth, device);
  cudaGetLastError();                 // a failed look-up must not surface in somebody else's check
  return 2e3 * kilohertz * bits / 8;  // two transfers a clock
}

const char* cuda_unavailable_reason() {
  int count = 0;
  const cudaError_t error = cudaGetDeviceCount(&count);
  if (error != cudaSuccess) {
    cudaGetLastError();  // a failed look-up must not surface in somebody else's check
    int driver = 0;
    cudaDriverGetVersion(&driver);
    return driver == 0 ? "no NVIDIA driver was found" : cudaGetErrorString(error);
  }
  if (count == 0) return "no CUDA device";
#if CUDART_VERSION >= 12010
  // With an older driver of the same major version, all would work but launches of many tensors.
  int driver = 0;
  cudaDriverGetVersion(&driver);
  if (driver < 12010) {
    return "the NVIDIA driver is older than CUDA 12.1, which this build needs: update the driver";
  }
#endif
  return "";
}

int cuda_runtime_version() { return CUDART_VERSION; }

}  // namespace lrs
