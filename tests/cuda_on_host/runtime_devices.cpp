// Devices, their memory, and what they do not do: the kernels of torch.
#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <utility>

#include "runtime.h"

namespace runtime {

constexpr size_t kDeviceBytes = size_t{80} << 30;
constexpr size_t kFilledBytes = size_t{64} << 20;  // longer allocations are not overwritten

struct Memory {
  size_t bytes;
  cudaMemoryType type;
  int device;
};

auto& memory = *new std::map<uintptr_t, Memory>;

int device_count() {
  const char* visible = std::getenv("CUDA_VISIBLE_DEVICES");
  if (!visible) return kDevices;
  if (*visible == '\0') return 0;
  return std::min<int>(kDevices, 1 + std::count(visible, visible + std::strlen(visible), ','));
}

const Memory* memory_at(const void* pointer) {
  const auto address = reinterpret_cast<uintptr_t>(pointer);
  auto after = memory.upper_bound(address);
  if (after == memory.begin()) return nullptr;
  const auto& [begin, found] = *--after;
  return address - begin < std::max<size_t>(found.bytes, 1) ? &found : nullptr;
}

cudaError_t allocate(void** pointer, size_t bytes, cudaMemoryType type) {
  Lock lock;
  if (is_forbidden()) return fail(cudaErrorStreamCaptureUnsupported);
  if (posix_memalign(pointer, 512, std::max<size_t>(bytes, 1))) {
    return fail(cudaErrorMemoryAllocation);
  }
  if (bytes <= kFilledBytes) std::memset(*pointer, 0xa5, bytes);
  memory[reinterpret_cast<uintptr_t>(*pointer)] = {bytes, type, current_device};
  return cudaSuccess;
}

cudaError_t release(void* pointer) {
  Lock lock;
  if (is_forbidden()) return fail(cudaErrorStreamCaptureUnsupported);
  run_everything();
  memory.erase(reinterpret_cast<uintptr_t>(pointer));
  std::free(pointer);
  return cudaSuccess;
}

cudaError_t copy(void* target, const void* source, size_t bytes, Stream* stream) {
  Lock lock;
  if (!memory_at(source) && !stream->capture) {
    const auto begin = static_cast<const char*>(source);
    const auto staged = std::make_shared<std::vector<char>>(begin, begin + bytes);
    return enqueue(stream, [=] { std::memcpy(target, staged->data(), bytes); });
  }
  enqueue(stream, [=] { std::memmove(target, source, bytes); });
  if (memory_at(target) || stream->capture) return cudaSuccess;
  run_all(stream);
  return outcome();
}

int not_supported() { return cudaErrorNotSupported; }

}  // namespace runtime

using namespace runtime;

extern "C" {

// ---- devices

cudaError_t cudaGetDeviceCount(int* count) {
  *count = device_count();
  return *count == 0 ? fail(cudaErrorNoDevice) : cudaSuccess;
}
cudaError_t cudaGetDevice(int* device) { return *device = current_device, cudaSuccess; }
cudaError_t cudaSetDevice(int device) {
  if (device < 0 || device >= device_count()) return fail(cudaErrorInvalidDevice);
  current_device = device;
  return cudaSuccess;
}
cudaError_t cudaMemGetInfo(size_t* free, size_t* total) {
  *free = *total = kDeviceBytes;
  return cudaSuccess;
}
cudaError_t cudaGetDeviceProperties(cudaDeviceProp* properties, int device) {
  *properties = cudaDeviceProp{};
  std::strcpy(properties->name, "CUDA on the host");
  properties->major = 9;
  properties->totalGlobalMem = kDeviceBytes;
  properties->multiProcessorCount = 132;
  properties->warpSize = 32;
  properties->maxThreadsPerBlock = 1024;
  properties->maxThreadsPerMultiProcessor = 2048;
  properties->sharedMemPerBlock = 48 << 10;
  properties->sharedMemPerBlockOptin = 227 << 10;
  properties->regsPerBlock = 65536;
  properties->l2CacheSize = 50 << 20;
  properties->pciBusID = device + 1;
  return cudaSuccess;
}
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  const std::map<int, int> values = {{cudaDevAttrComputeCapabilityMajor, 9},
                                     {cudaDevAttrMultiProcessorCount, 132},
                                     {cudaDevAttrWarpSize, 32},
                                     {cudaDevAttrMemoryClockRate, 2619000},
                                     {cudaDevAttrGlobalMemoryBusWidth, 5120}};
  const auto found = values.find(attribute);
  *value = found == values.end() ? 0 : found->second;
  return cudaSuccess;
}
cudaError_t cudaDeviceGetPCIBusId(char* id, int bytes, int device) {
  std::snprintf(id, bytes, "0000:%02x:00.0", device + 1);
  return cudaSuccess;
}
cudaError_t cudaDriverGetVersion(int* version) { return *version = CUDART_VERSION, cudaSuccess; }
cudaError_t cudaRuntimeGetVersion(int* version) { return *version = CUDART_VERSION, cudaSuccess; }
cudaError_t cudaDeviceCanAccessPeer(int* can, int, int) { return *can = 1, cudaSuccess; }
cudaError_t cudaDeviceEnablePeerAccess(int, unsigned) { return cudaSuccess; }
cudaError_t cudaDeviceGetStreamPriorityRange(int* least, int* greatest) {
  if (least) *least = 0;
  if (greatest) *greatest = -5;
  return cudaSuccess;
}
cudaError_t cudaGetLastError() { return std::exchange(last_error, cudaSuccess); }
cudaError_t cudaPeekAtLastError() { return last_error; }
cudaError_t cudaProfilerStart() { return cudaSuccess; }
cudaError_t cudaProfilerStop() { return cudaSuccess; }

// ---- memory

cudaError_t cudaMalloc(void** pointer, size_t bytes) {
  return allocate(pointer, bytes, cudaMemoryTypeDevice);
}
cudaError_t cudaFree(void* pointer) { return release(pointer); }
cudaError_t cudaHostAlloc(void** pointer, size_t bytes, unsigned) {
  return allocate(pointer, bytes, cudaMemoryTypeHost);
}
cudaError_t cudaFreeHost(void* pointer) { return release(pointer); }
cudaError_t cudaHostRegister(void* pointer, size_t bytes, unsigned) {
  Lock lock;
  memory[reinterpret_cast<uintptr_t>(pointer)] = {bytes, cudaMemoryTypeHost, current_device};
  return cudaSuccess;
}
cudaError_t cudaHostUnregister(void* pointer) {
  Lock lock;
  memory.erase(reinterpret_cast<uintptr_t>(pointer));
  return cudaSuccess;
}
cudaError_t cudaPointerGetAttributes(cudaPointerAttributes* attributes, const void* pointer) {
  Lock lock;
  *attributes = {};
  const Memory* found = memory_at(pointer);
  if (!found) return cudaSuccess;
  attributes->type = found->type;
  attributes->device = found->device;
  attributes->devicePointer = const_cast<void*>(pointer);
  if (found->type == cudaMemoryTypeHost) attributes->hostPointer = const_cast<void*>(pointer);
  return cudaSuccess;
}
cudaError_t cudaMemcpyAsync(void* target, const void* source, size_t bytes, cudaMemcpyKind,
                            cudaStream_t stream) {
  return copy(target, source, bytes, stream_of(stream));
}
cudaError_t cudaMemcpyPeerAsync(void* target, int, const void* source, int, size_t bytes,
                                cudaStream_t stream) {
  return copy(target, source, bytes, stream_of(stream));
}
cudaError_t cudaMemcpy(void* target, const void* source, size_t bytes, cudaMemcpyKind) {
  Lock lock;
  if (is_forbidden()) return fail(cudaErrorStreamCaptureUnsupported);
  run_all(stream_of(nullptr));
  std::memmove(target, source, bytes);
  return outcome();
}
cudaError_t cudaMemset(void* target, int value, size_t bytes) {
  return enqueue(stream_of(nullptr), [=] { std::memset(target, value, bytes); });
}
cudaError_t cudaMemsetAsync(void* target, int value, size_t bytes, cudaStream_t stream) {
  return enqueue(stream_of(stream), [=] { std::memset(target, value, bytes); });
}

// ---- kernels of torch, and what it looks up in the driver

cudaError_t cudaLaunchKernel(const void*, dim3, dim3, void**, size_t, cudaStream_t) {
  return cudaSuccess;
}
cudaError_t __cudaLaunchKernel(cudaKernel_t, dim3, dim3, void**, size_t, cudaStream_t) {
  return cudaSuccess;
}
cudaError_t __cudaGetKernel(cudaKernel_t* kernel, const void*) {
  return *kernel = nullptr, cudaSuccess;
}
void** __cudaRegisterFatBinary(void*) {
  static void* handle;
  return &handle;
}
void __cudaRegisterFatBinaryEnd(void**) {}
void __cudaUnregisterFatBinary(void**) {}
void __cudaRegisterFunction(void**, const char*, char*, const char*, int, uint3*, uint3*, dim3*,
                            dim3*, int*) {}
void __cudaRegisterVar(void**, char*, char*, const char*, int, size_t, int, int) {}
char __cudaInitModule(void**) { return 0; }
unsigned __cudaPushCallConfiguration(dim3, dim3, size_t, CUstream_st*) { return 0; }
cudaError_t __cudaPopCallConfiguration(dim3* blocks, dim3* threads, size_t* bytes, void* stream) {
  *blocks = *threads = {1, 1, 1};
  *bytes = 0;
  *static_cast<void**>(stream) = nullptr;
  return cudaSuccess;
}
int cuDevicePrimaryCtxGetState(int, unsigned* flags, int* is_active) {
  *flags = 0;
  *is_active = 1;
  return cudaSuccess;
}
cudaError_t cudaGetDriverEntryPointByVersion(const char* name, void** function, unsigned,
                                             unsigned long long,
                                             cudaDriverEntryPointQueryResult* result) {
  const bool is_state = std::strcmp(name, "cuDevicePrimaryCtxGetState") == 0;
  *function = is_state ? reinterpret_cast<void*>(cuDevicePrimaryCtxGetState)
                       : reinterpret_cast<void*>(not_supported);
  if (result) *result = cudaDriverEntryPointSuccess;
  return cudaSuccess;
}

}  // extern "C"
