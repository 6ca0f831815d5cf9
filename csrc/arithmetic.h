// Roots and reciprocals, rounded to nearest everywhere, so that all backends agree to the bit.
//
// What nvcc makes of `sqrtf` and `/` handles rare operands in a function of its own, and around the
// call to it the elements of a thread cannot overlap. With kOverlaps they take no branch and some
// registers more: that pays where arithmetic is what a kernel waits for. The steps from the
// approximation on are those of nvcc for all other operands: that they round to nearest is a
// property of the GPU's approximations, which tests try on each.
#pragma once

#include <cmath>

#include "host_device.h"

namespace lrs {
inline namespace LRS_ISA {

#if defined(__CUDA_ARCH__)

namespace overlapping {

// Of a number that is not negative. One Newton step from the approximation, with its exact
// remainder; where that would be too small to be a float, the operand is scaled.
__device__ __forceinline__ float square_root(float x) {
  const bool is_tiny = x < 0x1p-96f;
  const float scaled = is_tiny ? x * 0x1p64f : x;
  float inverse;
  asm("rsqrt.approx.ftz.f32 %0, %1;" : "=f"(inverse) : "f"(scaled));
  const float root = scaled * inverse;
  const float remainder = __fmaf_rn(-root, root, scaled);
  const float refined = __fmaf_rn(remainder, 0.5f * inverse, root);
  // nan for 0, infinity and nan, which are their own roots.
  const float result = remainder == remainder ? refined : scaled;
  return is_tiny ? result * 0x1p-32f : result;
}

// 1 / x of a number that is 0 or from 2^-126 to 2^126, or infinity or nan. (What is larger is a
// root, of 2^64 at most, plus an eps of that size.)
__device__ __forceinline__ float reciprocal(float x) {
  float inverse;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(inverse) : "f"(x));
  const float remainder = __fmaf_rn(-x, inverse, 1.0f);
  const float refined = __fmaf_rn(inverse, remainder, inverse);
  return remainder == remainder ? refined : inverse;  // nan for 0, infinity and nan
}

}  // namespace overlapping

#endif

template <bool kOverlaps>
LRS_HOST_DEVICE float square_root(float x) {
#if defined(__CUDA_ARCH__)
  if constexpr (kOverlaps) return overlapping::square_root(x);
#endif
  return sqrtf(x);
}

template <bool kOverlaps>
LRS_HOST_DEVICE float reciprocal(float x) {
#if defined(__CUDA_ARCH__)
  if constexpr (kOverlaps) return overlapping::reciprocal(x);
#endif
  return 1.0f / x;
}

struct Powers {
  double first, second;
};

// base^exponent for 0 <= base < 1 and a positive integer, by squaring; its distance from 1 is wrong
// by less than a part in 1e12 for a base of 0.9999, in 1e10 for 0.999999. On a GPU, where every
// block waits for them, `pow` is a chain of some hundred operations, and two powers in one loop
// take the time of one.
LRS_HOST_DEVICE Powers integer_powers(double first, double second, double exponent) {
  Powers powers{1.0, 1.0};
  constexpr double kMost = 4294967295.0;  // a count that was loaded may be more
  const auto count = static_cast<uint32_t>(exponent < kMost ? exponent : kMost);
  for (uint32_t bits = count; bits != 0; bits >>= 1) {
    if (bits & 1u) {
      powers.first *= first;
      powers.second *= second;
    }
    first *= first;
    second *= second;
  }
  return powers;
}

// A positive number as one whose reciprocal is a float; 0 stays 0.
LRS_HOST_DEVICE float with_reciprocal(double x) {
  const auto value = static_cast<float>(x);
  return value > 0.0f && value < 0x1p-126f ? 0x1p-126f : value;
}

}  // namespace LRS_ISA
}  // namespace lrs
