// What the step kernels have in common: their shape and arguments, wide accesses, the commit.
#pragma once

#include <cuda_runtime.h>

#include "tensor_table.h"

namespace lrs {

constexpr int kThreads = 256;
constexpr int kBlocksPerSM = 4;  // bounds the registers at 64 a thread

// Gradients change address from step to step, so their addresses travel with the launch. CUDA 12.1
// raised the limit of a kernel's arguments from 4 KB to 32 KB.
#if CUDART_VERSION >= 12010
constexpr int kGradientsPerLaunch = 4000;
#else
constexpr int kGradientsPerLaunch = 480;
#endif

struct Gradients {
  const void* address[kGradientsPerLaunch];
};

struct Launch {
  StepTable table;  // its chunks are those of this launch
  int64_t first_tensor, num_tensors;
  bool commits_step;
};

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

// Advances the counters once every block of the launch has read them: the block that draws the last
// ticket does it.
__device__ __forceinline__ void commit(const Launch& launch, const Gradients& gradients) {
  __shared__ bool is_last;
  __syncthreads();
  if (threadIdx.x == 0) {
    __threadfence();
    is_last = atomicAdd(launch.table.ticket, 1u) == gridDim.x - 1;
  }
  __syncthreads();
  if (!is_last) return;
  for (int64_t i = threadIdx.x; i < launch.num_tensors; i += kThreads) {
    if (gradients.address[i] != nullptr) {
      *launch.table.tensors[launch.first_tensor + i].step += 1.0f;
    }
  }
  if (threadIdx.x == 0) {
    *launch.table.ticket = 0;
    if (launch.commits_step) *launch.table.step += 1;
  }
}

}  // namespace lrs
