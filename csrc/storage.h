// Storage types: how an element is kept in memory. Arithmetic is float32 whatever the storage.
#pragma once

#include "host_device.h"

#if defined(__CUDACC__)
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#else
#include <cstring>
#endif

namespace lrs {

// Values are the codes of the device table.
enum class DType : int64_t { kFloat32, kBFloat16, kFloat16 };

inline namespace LRS_ISA {

#if defined(__CUDACC__)

using BFloat16 = __nv_bfloat16;
using Float16 = __half;

LRS_HOST_DEVICE float load(float value) { return value; }
LRS_HOST_DEVICE float load(BFloat16 value) { return __bfloat162float(value); }
LRS_HOST_DEVICE float load(Float16 value) { return __half2float(value); }

LRS_HOST_DEVICE void store(float& target, float value) { target = value; }
LRS_HOST_DEVICE void store(BFloat16& target, float value) { target = __float2bfloat16_rn(value); }
LRS_HOST_DEVICE void store(Float16& target, float value) { target = __float2half_rn(value); }

#else

struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

LRS_HOST_DEVICE float from_bits(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof(value));
  return value;
}

LRS_HOST_DEVICE uint32_t to_bits(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof(bits));
  return bits;
}

LRS_HOST_DEVICE float load(float value) { return value; }

LRS_HOST_DEVICE float load(BFloat16 value) { return from_bits(uint32_t{value.bits} << 16); }

// Branch-free, so that compilers vectorise it on every instruction set. The 15 magnitude bits
// become a float32 that is 2^112 too small; the product is exact, subnormals included. Infinity and
// nan, whose exponent a product cannot carry over, get it set by hand.
LRS_HOST_DEVICE float load(Float16 value) {
  const uint32_t sign = (uint32_t{value.bits} & 0x8000u) << 16;
  const uint32_t magnitude = (uint32_t{value.bits} & 0x7fffu) << 13;
  const uint32_t finite = to_bits(from_bits(magnitude) * 0x1p112f);
  const uint32_t special = magnitude | 0x7f800000u;
  return from_bits(sign | (magnitude >= 0x0f800000u ? special : finite));
}

LRS_HOST_DEVICE void store(float& target, float value) { target = value; }

// Round to nearest, ties to even: the carry of the addition is the rounding.
LRS_HOST_DEVICE void store(BFloat16& target, float value) {
  const uint32_t bits = to_bits(value);
  const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  const bool is_nan = (bits & 0x7fffffffu) > 0x7f800000u;
  target.bits = static_cast<uint16_t>(is_nan ? 0x7fffu : rounded);
}

// As above for normal results. Subnormal results are rounded by a float32 addition to 0.5, whose
// last bit has the weight of float16's smallest number.
LRS_HOST_DEVICE void store(Float16& target, float value) {
  const uint32_t sign = to_bits(value) >> 16 & 0x8000u;
  const uint32_t magnitude = to_bits(value) & 0x7fffffffu;
  const uint32_t normal = (magnitude - 0x38000000u + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
  const uint32_t subnormal = to_bits(from_bits(magnitude) + 0.5f) - 0x3f000000u;
  uint32_t bits = magnitude < 0x38800000u ? subnormal : normal;
  bits = magnitude >= 0x477ff000u ? 0x7c00u : bits;  // rounds to 2^16 or above: infinity
  bits = magnitude > 0x7f800000u ? 0x7e00u : bits;   // nan
  target.bits = static_cast<uint16_t>(sign | bits);
}

#endif

}  // namespace LRS_ISA
}  // namespace lrs
