// What csrc/*.cu use of CUDA, in terms of blocks.h: words of the language, built-in functions, the
// runtime, which is that of runtime.h if ON_HOST_RUNTIME is defined. Incomplete by design: what a
// kernel starts to use and the compiler misses goes here.
#pragma once

#include <cmath>

#include "blocks.h"

// The last one whose launches take 4 KB of arguments: few tensors fill several launches.
#define CUDART_VERSION 12000

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)

#define __builtin_assume(condition) static_cast<void>(condition)
#define __isGlobal(pointer) true

extern on_host::Index threadIdx, blockIdx, blockDim, gridDim;

struct alignas(8) uint2 : on_host::Aligned<8> {
  unsigned x, y;
};
struct alignas(16) uint4 : on_host::Aligned<16> {
  unsigned x, y, z, w;
};

inline void __threadfence() {}

template <typename T>
T __ldcg(const T* address) {
  return *address;
}

template <typename T>
T atomicAdd(T* target, T value) {
  const T old = *target;
  *target += value;
  return old;
}

inline void __syncthreads(int line = __builtin_LINE()) { on_host::sync_block(line); }

// Two variables in turns: a thread may come to the next barrier before others have left this one.
inline int __syncthreads_or(int predicate, int line = __builtin_LINE()) {
  static int any[2];
  static unsigned turn, arrived;
  int* const own = &any[turn];
  if (arrived == 0) *own = 0;
  *own |= predicate != 0;
  if (++arrived == blockDim.x) turn ^= 1, arrived = 0;
  on_host::sync_block(line);
  return *own;
}

inline void __syncwarp(unsigned mask = 0xffffffffu, int line = __builtin_LINE()) {
  on_host::exchange(mask, 0, on_host::lane(), line);
}

template <typename T>
T __shfl_sync(unsigned mask, T value, int source, int width = 32, int line = __builtin_LINE()) {
  const unsigned first = on_host::lane() / width * width;
  return on_host::shuffle(mask, value, first + static_cast<unsigned>(source) % width, line);
}

template <typename T>
T __shfl_xor_sync(unsigned mask, T value, int lanes, int width = 32, int line = __builtin_LINE()) {
  const unsigned source = on_host::within_segment(on_host::lane() ^ lanes, width);
  return on_host::shuffle(mask, value, source, line);
}

template <typename T>
T __shfl_down_sync(unsigned mask, T value, unsigned lanes, int width = 32,
                   int line = __builtin_LINE()) {
  const unsigned source = on_host::within_segment(on_host::lane() + lanes, width);
  return on_host::shuffle(mask, value, source, line);
}

inline unsigned __reduce_max_sync(unsigned mask, unsigned value, int line = __builtin_LINE()) {
  for (int lanes = 16; lanes > 0; lanes /= 2) {
    const unsigned other = __shfl_xor_sync(mask, value, lanes, 32, line);
    value = other > value ? other : value;
  }
  return value;
}

// Byte number i of the result is the byte of x (0 to 3) or y (4 to 7) that digit i of `selector`
// says.
inline unsigned __byte_perm(unsigned x, unsigned y, unsigned selector) {
  const uint64_t bytes = uint64_t{y} << 32 | x;
  unsigned result = 0;
  for (int i = 0; i < 4; ++i) {
    result |= static_cast<unsigned>(bytes >> (8 * (selector >> (4 * i) & 7)) & 0xff) << (8 * i);
  }
  return result;
}

using cudaStream_t = CUstream_st*;
enum cudaError_t { cudaSuccess };
enum cudaDeviceAttr { cudaDevAttrMemoryClockRate = 36, cudaDevAttrGlobalMemoryBusWidth = 37 };

#ifdef ON_HOST_RUNTIME
extern "C" {
const char* cudaGetErrorString(cudaError_t);
cudaError_t cudaGetLastError();
cudaError_t cudaSetDevice(int);
cudaError_t cudaGetDevice(int* device);
cudaError_t cudaGetDeviceCount(int* count);
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr, int);
cudaError_t cudaDriverGetVersion(int* version);
}
#else
inline const char* cudaGetErrorString(cudaError_t) { return "no error"; }
inline cudaError_t cudaGetLastError() { return cudaSuccess; }
inline cudaError_t cudaSetDevice(int) { return cudaSuccess; }

inline cudaError_t cudaGetDevice(int* device) { return *device = 0, cudaSuccess; }
inline cudaError_t cudaGetDeviceCount(int* count) { return *count = 1, cudaSuccess; }
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr, int) {
  return *value = 0, cudaSuccess;
}
inline cudaError_t cudaDriverGetVersion(int* version) {
  return *version = CUDART_VERSION, cudaSuccess;
}
#endif
