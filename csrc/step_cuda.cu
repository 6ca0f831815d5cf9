// The CUDA backend: one launch updates every tensor of every group and commits the step; LAMB takes
// two.
#include <cuda_runtime.h>

#include <algorithm>
#include <stdexcept>
#include <string>

#include "lamb_cuda.cuh"
#include "launch.cuh"
#include "step_cuda.h"

namespace lrs {
namespace {

// Updates kLane elements from `begin` on.
template <int kLane, int kNumStates, typename Update, typename Param>
__device__ __forceinline__ void update_lane(const Update& update, Param* param, const Param* grad,
                                            float* const (&states)[kMaxStates], int64_t begin) {
  constexpr int kRegisterStates = kNumStates > 0 ? kNumStates : 1;
  alignas(16) Param param_lane[kLane];
  alignas(16) Param grad_lane[kLane];
  alignas(16) float state_lanes[kRegisterStates][kLane];
  copy_lane<kLane>(param_lane, global(param + begin));
  copy_lane<kLane>(grad_lane, global(grad + begin));
#pragma unroll
  for (int s = 0; s < kNumStates; ++s) copy_lane<kLane>(state_lanes[s], global(states[s] + begin));
#pragma unroll
  for (int i = 0; i < kLane; ++i) {
    float value = load(param_lane[i]);
    float state[kMaxStates];
#pragma unroll
    for (int s = 0; s < kNumStates; ++s) state[s] = state_lanes[s][i];
    update.template apply<kNumStates>(value, load(grad_lane[i]), state);
#pragma unroll
    for (int s = 0; s < kNumStates; ++s) state_lanes[s][i] = state[s];
    store(param_lane[i], value);
  }
  copy_lane<kLane>(global(param + begin), param_lane);
#pragma unroll
  for (int s = 0; s < kNumStates; ++s) copy_lane<kLane>(global(states[s] + begin), state_lanes[s]);
}

template <int kNumStates, typename Param, typename Update>
__device__ __forceinline__ void update_chunk(const Update& update, const TensorEntry& entry,
                                             const void* gradient, Range range) {
  // Beside float32 states, four elements make neighbouring threads touch neighbouring 16 bytes of
  // the states, which are most of the traffic.
  constexpr int kLane = kNumStates > 0 ? 4 : 16 / sizeof(Param);
  Param* param = static_cast<Param*>(entry.param);
  const Param* grad = static_cast<const Param*>(gradient);
  uint64_t addresses[2 + kNumStates];
  int bytes[2 + kNumStates];
  float* states[kMaxStates];
  addresses[0] = reinterpret_cast<uint64_t>(param);
  addresses[1] = reinterpret_cast<uint64_t>(grad);
  bytes[0] = bytes[1] = sizeof(Param);
#pragma unroll
  for (int s = 0; s < kNumStates; ++s) {
    states[s] = entry.states[s];
    addresses[2 + s] = reinterpret_cast<uint64_t>(entry.states[s]);
    bytes[2 + s] = sizeof(float);
  }
  const Range vector = vector_range(range, kLane, addresses, bytes);
  for (int64_t i = range.begin + threadIdx.x; i < vector.begin; i += kThreads) {
    update_lane<1, kNumStates>(update, param, grad, states, i);
  }
  for (int64_t i = vector.begin + threadIdx.x * kLane; i < vector.end; i += kThreads * kLane) {
    update_lane<kLane, kNumStates>(update, param, grad, states, i);
  }
  for (int64_t i = vector.end + threadIdx.x; i < range.end; i += kThreads) {
    update_lane<1, kNumStates>(update, param, grad, states, i);
  }
}

template <int kNumStates, typename Update>
__device__ __forceinline__ void update_chunk_of_dtype(const Update& update,
                                                      const TensorEntry& entry,
                                                      const void* gradient, Range range) {
  switch (entry.dtype) {
    case DType::kFloat32:
      return update_chunk<kNumStates, float>(update, entry, gradient, range);
    case DType::kBFloat16:
      return update_chunk<kNumStates, BFloat16>(update, entry, gradient, range);
    case DType::kFloat16:
      return update_chunk<kNumStates, Float16>(update, entry, gradient, range);
  }
}

template <typename Update>
__global__ void __launch_bounds__(kThreads, kBlocksPerSM)
    step_kernel(const __grid_constant__ Launch launch,
                const __grid_constant__ Gradients gradients) {
  __shared__ Update shared_update;
  const StepTable& table = launch.table;
  if (blockIdx.x < table.num_chunks) {  // a launch without chunks still commits
    const Chunk chunk = table.chunks[blockIdx.x];
    const void* gradient = gradients.address[chunk.tensor - launch.first_tensor];
    if (gradient != nullptr) {
      const TensorEntry entry = table.tensors[chunk.tensor];
      if (threadIdx.x == 0) {
        const Group& group = table.groups[entry.group];
        const double step = static_cast<double>(*entry.step) + 1.0;
        shared_update = Update::fold(group.hyper, learning_rate(group, *table.step), step);
      }
      __syncthreads();
      const Update update = shared_update;
      const Range range = chunk_range(entry.numel, table.chunk_elements, chunk.index);
      if (entry.states[Update::kMaxStates - 1] != nullptr) {
        update_chunk_of_dtype<Update::kMaxStates>(update, entry, gradient, range);
      } else {
        update_chunk_of_dtype<Update::kMinStates>(update, entry, gradient, range);
      }
    }
  }
  commit(launch, gradients);
}

__global__ void fill_schedule_kernel(ScheduleSpec schedule, int64_t count, float* values) {
  const int64_t stride = static_cast<int64_t>(gridDim.x) * blockDim.x;
  for (int64_t i = blockIdx.x * static_cast<int64_t>(blockDim.x) + threadIdx.x; i < count;
       i += stride) {
    values[i] = static_cast<float>(schedule_value(schedule, i));
  }
}

__global__ void write_group_kernel(Group* target, Group group) { *target = group; }

void check(cudaError_t error, const char* what) {
  if (error == cudaSuccess) return;
  throw std::runtime_error(std::string(what) + " failed: " + cudaGetErrorString(error));
}

// Makes `device` current for a scope.
class DeviceScope {
 public:
  explicit DeviceScope(int device) {
    check(cudaGetDevice(&previous_), "cudaGetDevice");
    if (previous_ != device) check(cudaSetDevice(device), "cudaSetDevice");
    changed_ = previous_ != device;
  }
  ~DeviceScope() {
    if (changed_) cudaSetDevice(previous_);
  }
  DeviceScope(const DeviceScope&) = delete;
  DeviceScope& operator=(const DeviceScope&) = delete;

 private:
  int previous_ = 0;
  bool changed_ = false;
};

void launch_step(const Launch& launch, const Gradients& gradients, cudaStream_t stream) {
  const auto blocks = static_cast<unsigned>(std::max<int64_t>(launch.table.num_chunks, 1));
  switch (launch.table.algorithm) {
    case Algorithm::kSGD:
      step_kernel<SGD><<<blocks, kThreads, 0, stream>>>(launch, gradients);
      break;
    case Algorithm::kAdam:
      step_kernel<Adam><<<blocks, kThreads, 0, stream>>>(launch, gradients);
      break;
    case Algorithm::kLion:
      step_kernel<Lion><<<blocks, kThreads, 0, stream>>>(launch, gradients);
      break;
    case Algorithm::kLAMB:
      if (launch.table.num_chunks > 0) {
        lamb_moments_kernel<<<blocks, kThreads, 0, stream>>>(launch, gradients);
      }
      lamb_params_kernel<<<blocks, kThreads, 0, stream>>>(launch, gradients);
      break;
  }
  check(cudaGetLastError(), "the launch of the step kernel");
}

}  // namespace

void step_cuda(const StepTable& table, const int64_t* chunk_offsets, const void* const* gradients,
               int device, void* stream) {
  const auto has_gradient = [](const void* gradient) { return gradient != nullptr; };
  if (std::none_of(gradients, gradients + table.num_tensors, has_gradient)) return;
  const DeviceScope scope(device);
  for (int64_t first = 0; first < table.num_tensors; first += kGradientsPerLaunch) {
    const int64_t last = std::min(first + kGradientsPerLaunch, table.num_tensors);
    Launch launch{table, first, last - first, last == table.num_tensors};
    launch.table.chunks += chunk_offsets[first];
    launch.table.chunk_squares += chunk_offsets[first];
    launch.table.num_chunks = chunk_offsets[last] - chunk_offsets[first];
    Gradients arguments;
    std::copy(gradients + first, gradients + last, arguments.address);
    launch_step(launch, arguments, static_cast<cudaStream_t>(stream));
  }
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

const char* cuda_unavailable_reason() {
  int count = 0;
  const cudaError_t error = cudaGetDeviceCount(&count);
  if (error != cudaSuccess) {
    cudaGetLastError();  // a failed look-up must not surface in somebody else's check
    int driver = 0;
    cudaDriverGetVersion(&driver);
    return driver == 0 ? "no NVIDIA driver was found" : cudaGetErrorString(error);
  }
  return count > 0 ? "" : "no CUDA device";
}

int cuda_runtime_version() { return CUDART_VERSION; }

}  // namespace lrs
