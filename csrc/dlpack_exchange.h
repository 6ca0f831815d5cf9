// The part of DLPack's C exchange interface (DLPack 1.x, dlpack.h) that reads a tensor of a Python
// framework without copies, allocations or a link to that framework.
#pragma once

#include <cstdint>

namespace lrs::dlpack {

struct Device {
  int32_t type;  // kCPU, kCUDA, ...
  int32_t index;
};
constexpr int32_t kCPU = 1;
constexpr int32_t kCUDA = 2;

struct DataType {
  uint8_t code;  // kFloat, kBFloat, ...
  uint8_t bits;
  uint16_t lanes;
};
constexpr uint8_t kInt = 0;
constexpr uint8_t kUInt = 1;
constexpr uint8_t kFloat = 2;
constexpr uint8_t kBFloat = 4;

struct Tensor {
  void* data;
  Device device;
  int32_t ndim;
  DataType dtype;
  int64_t* shape;
  int64_t* strides;  // in elements
  uint64_t byte_offset;
};

struct ExchangeApi {
  uint32_t major_version, minor_version;
  ExchangeApi* previous;
  void* managed_tensor_allocator;
  void* managed_tensor_from_py_object;
  void* managed_tensor_to_py_object;
  // Fills `out` for the lifetime of `py_object`; -1 with a Python exception set on failure.
  int (*tensor_from_py_object)(void* py_object, Tensor* out);
  int (*current_work_stream)(int32_t device_type, int32_t device_index, void** out_stream);
};

constexpr uint32_t kMajorVersion = 1;
constexpr const char* kCapsuleName = "dlpack_exchange_api";

}  // namespace lrs::dlpack
