// Kernels that show what blocks.h does and reports. Each function returns what went wrong, or "".
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <string>

namespace {

constexpr int kThreads = 96;
constexpr unsigned kAllLanes = 0xffffffffu;

// Each thread gets five values: the sum of its warp, of its eight neighbours, of the lanes from its
// own on within 16, what lane 5 of its warp has, and, in the lower half, what its neighbour has.
__global__ void sums_kernel(const float* values, float* sums) {
  const float value = values[threadIdx.x];
  float warp = value, eight = value, suffix = value, neighbour = value;
  if (threadIdx.x % 32 < 16) neighbour = __shfl_xor_sync(0xffffu, value, 1);
  for (int lanes = 16; lanes > 0; lanes /= 2) warp += __shfl_xor_sync(kAllLanes, warp, lanes);
  for (int lanes = 4; lanes > 0; lanes /= 2) eight += __shfl_xor_sync(kAllLanes, eight, lanes, 8);
  for (unsigned lanes = 1; lanes < 16; lanes *= 2) {
    const float other = __shfl_down_sync(kAllLanes, suffix, lanes, 16);
    if (threadIdx.x % 16 + lanes < 16) suffix += other;
  }
  __syncwarp();
  const float results[] = {warp, eight, suffix, __shfl_sync(kAllLanes, value, 5), neighbour};
  for (int i = 0; i < 5; ++i) sums[5 * threadIdx.x + i] = results[i];
}

// A sum over the block through shared memory, with the barriers that it takes or without them.
template <bool kHasBarriers>
__global__ void block_sum_kernel(const float* values, float* sums) {
  __shared__ float shared[kThreads];
  shared[threadIdx.x] = values[threadIdx.x];
  if (kHasBarriers) __syncthreads();
  float sum = 0.0f;
  for (int i = 0; i < kThreads; ++i) sum += shared[i];
  sums[blockIdx.x * kThreads + threadIdx.x] = sum;
}

__global__ void different_barriers_kernel() {
  if (threadIdx.x < 10) {
    __syncthreads();
  } else {
    __syncthreads();
  }
}

__global__ void early_return_kernel() {
  if (threadIdx.x == 17) return;
  __syncthreads();
}

__global__ void missing_lane_kernel() {
  if (threadIdx.x != 40) __shfl_xor_sync(kAllLanes, 1.0f, 1);
}

template <typename Vector>
__global__ void copy_kernel(char* target, const char* source) {
  *reinterpret_cast<Vector*>(target) = *reinterpret_cast<const Vector*>(source);
}

__global__ void count_kernel(unsigned* count) { atomicAdd(count, 1u); }

template <typename Function>
const char* failure_of(const Function& launch) {
  static std::string message;
  try {
    launch();
    message = "";
  } catch (const std::exception& error) {
    message = error.what();
  }
  return message.c_str();
}

}  // namespace

#define EXPORT extern "C" __attribute__((visibility("default")))

EXPORT const char* sums(const float* values, float* sums) {
  return failure_of([&] { sums_kernel<<<1, kThreads>>>(values, sums); });
}
EXPORT const char* block_sum(const float* values, float* sums) {
  return failure_of([&] { block_sum_kernel<true><<<3, kThreads>>>(values, sums); });
}
EXPORT const char* block_sum_without_barriers(const float* values, float* sums) {
  return failure_of([&] { block_sum_kernel<false><<<3, kThreads>>>(values, sums); });
}
EXPORT const char* different_barriers() {
  return failure_of([] { different_barriers_kernel<<<1, kThreads>>>(); });
}
EXPORT const char* early_return() {
  return failure_of([] { early_return_kernel<<<1, kThreads>>>(); });
}
EXPORT const char* missing_lane() {
  return failure_of([] { missing_lane_kernel<<<1, kThreads>>>(); });
}
EXPORT const char* copy8(char* target, const char* source) {
  return failure_of([&] { copy_kernel<uint2><<<1, 1>>>(target, source); });
}
EXPORT const char* copy16(char* target, const char* source) {
  return failure_of([&] { copy_kernel<uint4><<<1, 1>>>(target, source); });
}
EXPORT const char* count(unsigned* count, unsigned blocks, unsigned threads) {
  return failure_of([&] { count_kernel<<<blocks, threads>>>(count); });
}

EXPORT void load_bfloat16(const __nv_bfloat16* source, float* target, int64_t count) {
  for (int64_t i = 0; i < count; ++i) target[i] = __bfloat162float(source[i]);
}
EXPORT void load_float16(const __half* source, float* target, int64_t count) {
  for (int64_t i = 0; i < count; ++i) target[i] = __half2float(source[i]);
}
EXPORT void store_bfloat16(const float* source, __nv_bfloat16* target, int64_t count) {
  for (int64_t i = 0; i < count; ++i) target[i] = __float2bfloat16_rn(source[i]);
}
EXPORT void store_float16(const float* source, __half* target, int64_t count) {
  for (int64_t i = 0; i < count; ++i) target[i] = __float2half_rn(source[i]);
}
