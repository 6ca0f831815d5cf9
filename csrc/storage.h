// Storage types: how an element is kept in memory. Arithmetic is float32 whatever the storage.
#pragma once

#include <cstring>

#include "host_device.h"

#if defined(__CUDACC__)
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#endif

namespace lrs {

// Values are the codes of the device table.
enum class DType : int64_t { kFloat32, kBFloat16, kFloat16 };

// How an optimizer keeps its states.
enum class StateType : int32_t { kFloat32, kBFloat16, kBlock8 };

inline constexpr int kQuantBlock = 128;  // elements that share a scale

inline namespace LRS_ISA {

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

LRS_HOST_DEVICE bool is_nan(float value) { return value != value; }

LRS_HOST_DEVICE float magnitude(float value) { return from_bits(to_bits(value) & 0x7fffffffu); }

#if defined(__CUDACC__)

using BFloat16 = __nv_bfloat16;
using Float16 = __half;

LRS_HOST_DEVICE float load(float value) { return value; }
LRS_HOST_DEVICE float load(BFloat16 value) { return __bfloat162float(value); }
LRS_HOST_DEVICE float load(Float16 value) { return __half2float(value); }

LRS_HOST_DEVICE void store(float& target, float value) { target = value; }
LRS_HOST_DEVICE void store(BFloat16& target, float value) { target = __float2bfloat16_rn(value); }
LRS_HOST_DEVICE void store(Float16& target, float value) { target = __float2half_rn(value); }

LRS_HOST_DEVICE uint16_t bits_of(BFloat16 value) { return __bfloat16_as_ushort(value); }
LRS_HOST_DEVICE BFloat16 bfloat16_of(uint32_t bits) {
  return __ushort_as_bfloat16(static_cast<uint16_t>(bits));
}

#else

struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

LRS_HOST_DEVICE uint16_t bits_of(BFloat16 value) { return value.bits; }
LRS_HOST_DEVICE BFloat16 bfloat16_of(uint32_t bits) { return {static_cast<uint16_t>(bits)}; }

LRS_HOST_DEVICE float load(float value) { return value; }

LRS_HOST_DEVICE float load(BFloat16 value) { return from_bits(uint32_t{value.bits} << 16); }

// Branch-free, so that compilers vectorise it on every instruction set. No number on the way is a
// subnormal float32, which a thread may flush to 0: a subnormal float16 gets the exponent of 2^-14
// and an implicit bit, which is taken away again. Infinity and nan get their exponent by hand.
LRS_HOST_DEVICE float load(Float16 value) {
  const uint32_t sign = (uint32_t{value.bits} & 0x8000u) << 16;
  const uint32_t magnitude = (uint32_t{value.bits} & 0x7fffu) << 13;
  const uint32_t normal = magnitude + 0x38000000u;
  const uint32_t subnormal = to_bits(from_bits(magnitude + 0x38800000u) - 0x1p-14f);
  const uint32_t finite = magnitude < 0x00800000u ? subnormal : normal;
  const uint32_t special = magnitude | 0x7f800000u;
  return from_bits(sign | (magnitude >= 0x0f800000u ? special : finite));
}

LRS_HOST_DEVICE void store(float& target, float value) { target = value; }

// To the nearest bfloat16, ties to even: the carry of the addition is the rounding. The result is
// the high half.
LRS_HOST_DEVICE uint32_t rounded_to_nearest(float value) {
  const uint32_t bits = to_bits(value);
  return is_nan(value) ? 0x7fff0000u : bits + 0x7fffu + ((bits >> 16) & 1u);
}

LRS_HOST_DEVICE void store(BFloat16& target, float value) {
  target = bfloat16_of(rounded_to_nearest(value) >> 16);
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

// To a bfloat16 above or below, with the probabilities that make it right on average. The result is
// the high half. `random` has 16 random bits.
LRS_HOST_DEVICE uint32_t rounded_at_random(float value, uint32_t random) {
  return is_nan(value) ? 0x7fff0000u : to_bits(value) + random;
}

LRS_HOST_DEVICE void store_stochastic(BFloat16& target, float value, uint32_t random) {
  target = bfloat16_of(rounded_at_random(value, random) >> 16);
}

// A float32 in two halves: a bfloat16, to nearest with ties away from zero, and the low 16 bits,
// whose sign says which way the rounding went. Nothing is lost. Here, the bfloat16 is the high half
// of a word, whose other bits may be any once it is split, as may those above the low 16.
LRS_HOST_DEVICE float join(uint32_t high, int32_t low) {
  return from_bits(high + static_cast<uint32_t>(low));
}

LRS_HOST_DEVICE void split(float value, uint32_t& high, uint32_t& low) {
  low = is_nan(value) ? 0x7fc00000u : to_bits(value);
  high = low + 0x8000u;
}

// 8-bit codes of numbers that are multiples of their block's scale. They are cut out of a float
// from 2^-15 to 2, the low 4 bits of its exponent and the top of its mantissa. They round
// stochastically, right on average to 2^-17 of a step: a moving average that moves by less than a
// step each time would otherwise never move. `random` has 16 random bits. The code of nan may be
// any: the scale of its block is nan too. Codes are read from byte number kByte of a word.

inline constexpr uint32_t kCodeBase = 0x38000000u;  // the bits of 2^-15, of which the code is 0

template <int kLeft>
LRS_HOST_DEVICE uint32_t shifted(uint32_t word) {
  if constexpr (kLeft < 0) {
    return word >> -kLeft;
  } else {
    return word << kLeft;
  }
}

// Sign, exponent and 3 bits of mantissa of a number that was moved away from 0 by 2^-15: so 0 is 0,
// and the numbers around it are evenly spaced. All but the sign are bits 20 to 26 of the result.
LRS_HOST_DEVICE uint32_t coded_magnitude(float multiple, uint32_t random) {
  return to_bits(magnitude(multiple) + from_bits(kCodeBase)) + (random << 4);
}

template <int kByte = 0>
LRS_HOST_DEVICE float decode_signed(uint32_t word) {
  const uint32_t moved = (shifted<20 - 8 * kByte>(word) & 0x07f00000u) | kCodeBase;
  const uint32_t sign = shifted<24 - 8 * kByte>(word) & 0x80000000u;
  return from_bits(to_bits(from_bits(moved) - from_bits(kCodeBase)) | sign);
}

// Exponent and 4 bits of mantissa, bits 19 to 26 of the result, for roots of second moments: they
// divide, so none is 0 unless its block is.
LRS_HOST_DEVICE uint32_t coded_root(float multiple, uint32_t random) {
  const auto bits = static_cast<int32_t>(to_bits(multiple) + (random << 3));
  constexpr auto kLeast = static_cast<int32_t>(kCodeBase);
  return static_cast<uint32_t>(bits < kLeast ? kLeast : bits);
}

template <int kByte = 0>
LRS_HOST_DEVICE float decode_root(uint32_t word) {
  return from_bits((shifted<19 - 8 * kByte>(word) & 0x07f80000u) | kCodeBase);
}

// The bits of a magnitude, whose order is that of magnitudes, nan above infinity. A root has no
// sign.
template <bool kIsRoot>
LRS_HOST_DEVICE uint32_t magnitude_bits(float value) {
  return kIsRoot ? to_bits(value) : to_bits(value) & 0x7fffffffu;
}

// The scale of a block whose largest magnitude has these bits: the smallest power of 2 of which
// that is less than the largest multiple, so that rounding up stays within the codes. It is 0 where
// that is smaller than a normal float, and nan, which makes all of the block nan, from 2^127 on.
template <bool kIsRoot>
LRS_HOST_DEVICE float block_scale(uint32_t magnitude) {
  constexpr uint32_t kLargest = kIsRoot ? 0x3ff80000u : 0x3fefff00u;  // 1.9375 or 1.875 - 2^-15
  constexpr uint32_t kCarry = 0x40000000u - kLargest;
  const bool is_finite = magnitude < 0x7f000000u - kCarry;
  return from_bits(is_finite ? (magnitude + kCarry) & 0x7f800000u : 0x7fc00000u);
}

// 1 / scale, by which numbers become multiples; some number for a scale of 0 or nan.
LRS_HOST_DEVICE float multiple_factor(float scale) {
  return from_bits(0x7f000000u - to_bits(scale));
}

}  // namespace LRS_ISA
}  // namespace lrs
