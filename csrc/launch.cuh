// What the CUDA kernels over a step table share: how they are cut into launches, wide accesses, how
// a launch finds its last block, and the commit.
#pragma once

#include <cuda_runtime.h>

#include <algorithm>
#include <stdexcept>
#include <string>

#include "tensor_table.h"

namespace lrs {

constexpr int kThreads = 256;
constexpr int kWarp = 32;
constexpr int kBlocksPerSM = 4;  // bounds the registers at 64 a thread

// Gradients change address from step to step, so their addresses travel with the launch, and with
// them the tensors of small tables: what a block reads from there it need not wait for. CUDA 12.1
// raised the limit of a kernel's arguments from 4 KB to 32 KB; a launch that needs less does not
// wait for as much.
constexpr int kFewGradients = 256;
#if CUDART_VERSION >= 12010
constexpr int kManyGradients = 3800;
constexpr int kArgumentBytes = 32764;
#else
constexpr int kManyGradients = 300;
constexpr int kArgumentBytes = 4096;
#endif
constexpr int kTensorsInLaunch = 8;
constexpr int kOtherArgumentBytes = 64;  // of any kernel

// The addresses of gradients, null where there is none: as they are, or, twice as many, by their
// distance from one of them if that is a multiple of 16 bytes below 64 GiB.
template <int kCapacity>
struct Gradients {
  static constexpr uint32_t kNone = 0xffffffffu;
  uintptr_t base;  // 0: `address` is what counts
  union {
    const void* address[kCapacity];
    uint32_t distance[2 * kCapacity];
  };

  LRS_HOST_DEVICE const void* at(int64_t index) const {
    if (base == 0) return address[index];
    if (distance[index] == kNone) return nullptr;
    return reinterpret_cast<const void*>(base + uint64_t{distance[index]} * 16);
  }
};

// The tensors of a table that has few, and the number of the first chunk of each.
struct FewTensors {
  int32_t count;  // 0: there are more
  uint32_t first_chunk[kTensorsInLaunch];
  TensorEntry tensors[kTensorsInLaunch];
};

struct Launch {
  StepTable table;  // its chunks are those of this launch
  int64_t first_tensor, num_tensors;
  bool is_last;
  FewTensors few;
};

static_assert(sizeof(Launch) + sizeof(Gradients<kFewGradients>) + kOtherArgumentBytes <= 4096);
static_assert(sizeof(Launch) + sizeof(Gradients<kManyGradients>) + kOtherArgumentBytes <=
              kArgumentBytes);

// Writes the gradients of `count` tensors by their distances. A gradient without chunks is empty;
// all that counts of it is that it is there. Returns whether that is possible.
template <int kCapacity>
bool write_distances(const void* const* gradients, const int64_t* chunk_offsets, int64_t count,
                     Gradients<kCapacity>* arguments) {
  const auto is_empty = [&](int64_t i) { return chunk_offsets[i] == chunk_offsets[i + 1]; };
  const auto address = [&](int64_t i) { return reinterpret_cast<uintptr_t>(gradients[i]); };
  arguments->base = UINTPTR_MAX;
  for (int64_t i = 0; i < count; ++i) {
    if (gradients[i] == nullptr || is_empty(i)) continue;
    arguments->base = std::min(arguments->base, address(i));
  }
  for (int64_t i = 0; i < count; ++i) {
    if (gradients[i] == nullptr || is_empty(i)) {
      arguments->distance[i] = gradients[i] == nullptr ? arguments->kNone : 0;
      continue;
    }
    const uintptr_t distance = address(i) - arguments->base;
    if (distance % 16 != 0 || distance / 16 >= arguments->kNone) return false;
    arguments->distance[i] = static_cast<uint32_t>(distance / 16);
  }
  return true;
}

// Writes as many gradients of `count` tensors as there is room for; returns their number.
template <int kCapacity>
int64_t write_gradients(const void* const* gradients, const int64_t* chunk_offsets, int64_t count,
                        Gradients<kCapacity>* arguments) {
  count = std::min<int64_t>(count, 2 * kCapacity);
  if (count > kCapacity && write_distances(gradients, chunk_offsets, count, arguments)) {
    return count;
  }
  count = std::min<int64_t>(count, kCapacity);
  arguments->base = 0;
  std::copy_n(gradients, count, arguments->address);
  return count;
}

// Calls body(launch, gradients) for one launch after the other.
template <typename Body>
void for_each_launch(const StepTable& table, const int64_t* chunk_offsets,
                     const void* const* gradients, const Body& body) {
  Launch launch{table, 0, 0, false, {}};
  if (table.num_tensors <= kTensorsInLaunch) {
    launch.few.count = static_cast<int32_t>(table.num_tensors);
    std::copy_n(table.host_tensors, table.num_tensors, launch.few.tensors);
    for (int i = 0; i < kTensorsInLaunch; ++i) {
      const bool exists = i < table.num_tensors;
      launch.few.first_chunk[i] = exists ? static_cast<uint32_t>(chunk_offsets[i]) : UINT32_MAX;
    }
  }
  const auto run = [&](int64_t count, const auto& arguments) {
    const int64_t first = launch.first_tensor;
    launch.num_tensors = count;
    launch.is_last = first + count == table.num_tensors;
    launch.table.chunks = table.chunks + chunk_offsets[first];
    launch.table.chunk_squares = table.chunk_squares + chunk_offsets[first];
    launch.table.num_chunks = chunk_offsets[first + count] - chunk_offsets[first];
    body(launch, arguments);
    launch.first_tensor += count;
  };
  while (!launch.is_last) {
    const int64_t left = table.num_tensors - launch.first_tensor;
    const void* const* rest = gradients + launch.first_tensor;
    const int64_t* offsets = chunk_offsets + launch.first_tensor;
    Gradients<kFewGradients> few;
    if (left <= 2 * kFewGradients && write_gradients(rest, offsets, left, &few) == left) {
      run(left, few);
    } else {
      Gradients<kManyGradients> many;
      const int64_t count = write_gradients(rest, offsets, left, &many);
      run(count, many);
    }
  }
}

// A launch without chunks still has a block.
inline unsigned num_blocks(const Launch& launch) {
  return static_cast<unsigned>(std::max<int64_t>(launch.table.num_chunks, 1));
}

inline void check(cudaError_t error, const char* what) {
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

#if defined(__CUDACC__)
// The chunk of this block.
__device__ __forceinline__ Chunk chunk_of_block(const Launch& launch) {
  if (launch.few.count == 0) return launch.table.chunks[blockIdx.x];
  int32_t tensor = 0;
#pragma unroll
  for (int i = 1; i < kTensorsInLaunch; ++i) tensor += blockIdx.x >= launch.few.first_chunk[i];
  return {tensor, static_cast<int32_t>(blockIdx.x - launch.few.first_chunk[tensor])};
}

__device__ __forceinline__ TensorEntry tensor_at(const Launch& launch, int64_t tensor) {
  if (launch.few.count == 0) return launch.table.tensors[tensor];
  return launch.few.tensors[tensor];
}

// Moves kLane elements between memory and registers, in accesses of 16 bytes, or of 8.
template <int kLane, typename T>
__device__ __forceinline__ void copy_lane(T* target, const T* source) {
  constexpr int kBytes = kLane * sizeof(T);
  if constexpr (kBytes % 16 == 0) {
#pragma unroll
    for (int i = 0; i < kBytes / 16; ++i) {
      reinterpret_cast<uint4*>(target)[i] = reinterpret_cast<const uint4*>(source)[i];
    }
  } else if constexpr (kBytes == 8) {
    *reinterpret_cast<uint2*>(target) = *reinterpret_cast<const uint2*>(source);
  } else if constexpr (kBytes == 4) {
    *reinterpret_cast<uint32_t*>(target) = *reinterpret_cast<const uint32_t*>(source);
  } else {
#pragma unroll
    for (int i = 0; i < kLane; ++i) target[i] = source[i];
  }
}

// Tells the compiler that an address from the table is in global memory.
template <typename T>
__device__ __forceinline__ T* global(T* address) {
  __builtin_assume(__isGlobal(address));
  return address;
}

// Has a line of global memory brought into the second-level cache, on architectures where that has
// been measured; for newer ones the addresses would not fit into the registers.
__device__ __forceinline__ void prefetch_line(const void* address) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 1000
  asm volatile("prefetch.global.L2 [%0];" ::"l"(address));
#endif
}

// The sum of one number per thread, in an order that depends on nothing else; valid in thread 0.
__device__ __forceinline__ double block_sum(double value) {
  __shared__ double values[kThreads];
  values[threadIdx.x] = value;
  __syncthreads();
  double sum = 0.0;
  if (threadIdx.x < kWarp) {
    for (int i = threadIdx.x; i < kThreads; i += kWarp) sum += values[i];
#pragma unroll
    for (int distance = kWarp / 2; distance > 0; distance /= 2) {
      sum += __shfl_down_sync(0xffffffffu, sum, distance);
    }
  }
  __syncthreads();  // the memory may be used again
  return sum;
}

// Whether this block draws the last ticket of its launch: everything that the others wrote before
// is visible to it. The ticket starts at 0 and is 0 again afterwards. For all threads of a block.
__device__ __forceinline__ bool is_last_block(uint32_t* ticket) {
  __shared__ bool is_last;
  __syncthreads();
  if (threadIdx.x == 0) {
    __threadfence();
    is_last = atomicAdd(ticket, 1u) == gridDim.x - 1;
    if (is_last) {
      *ticket = 0;
      __threadfence();
    }
  }
  __syncthreads();
  return is_last;
}

// Draws a ticket for this block, from 0 on, in one of its threads, which alone has read counters or
// has seen that the others have.
__device__ __forceinline__ uint32_t draw_ticket(uint32_t* ticket) {
  __threadfence();
  return atomicAdd(ticket, 1u);
}

// Advances the counters, in the block that drew the last ticket: every block has read them by then.
// `ticket` is that of the first thread. For all threads of a block.
template <int kCapacity>
__device__ __forceinline__ void commit(const Launch& launch, const Gradients<kCapacity>& gradients,
                                       uint32_t ticket) {
  if (!__syncthreads_or(threadIdx.x == 0 && ticket == gridDim.x - 1)) return;
  // Nobody else writes them: the atomic additions are for not waiting, which is what takes long.
  constexpr int kAtOnce = 4;
  for (int64_t first = threadIdx.x; first < launch.num_tensors; first += kAtOnce * kThreads) {
    float* steps[kAtOnce] = {};
#pragma unroll
    for (int k = 0; k < kAtOnce; ++k) {
      const int64_t i = first + k * kThreads;
      if (i >= launch.num_tensors || gradients.at(i) == nullptr) continue;
      steps[k] = tensor_at(launch, launch.first_tensor + i).step;
    }
#pragma unroll
    for (float* step : steps) {
      if (step != nullptr) atomicAdd(global(step), 1.0f);
    }
  }
  if (threadIdx.x != 0) return;
  *launch.table.ticket = 0;
  if (!launch.is_last || !launch.table.commits_step) return;
  atomicAdd(reinterpret_cast<unsigned long long*>(global(launch.table.step)), 1ull);
}
#endif

}  // namespace lrs
