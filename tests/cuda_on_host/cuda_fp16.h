#pragma once

#include <cmath>
#include <cstdint>

struct __half {
  uint16_t bits;
};

inline float __half2float(__half value) {
  const int exponent = value.bits >> 10 & 31, fraction = value.bits & 1023;
  float magnitude = std::ldexp(static_cast<float>(fraction + 1024), exponent - 25);
  if (exponent == 0) magnitude = std::ldexp(static_cast<float>(fraction), -24);
  if (exponent == 31) magnitude = fraction == 0 ? INFINITY : NAN;
  return value.bits >> 15 ? -magnitude : magnitude;
}

inline __half __float2half_rn(float value) {
  if (std::isnan(value)) return {0x7fff};
  const float magnitude = std::fabs(value);
  int bits;
  if (magnitude >= 65520.0f) {
    bits = 0x7c00;
  } else if (magnitude < 0x1p-14f) {  // subnormal: a multiple of 2^-24
    bits = static_cast<int>(std::nearbyint(magnitude * 0x1p24f));
  } else {
    int exponent;
    const float fraction = std::frexp(magnitude, &exponent);  // in [0.5, 1)
    bits = (exponent + 14 - 1) * 1024 + static_cast<int>(std::nearbyint(fraction * 2048.0f));
  }
  return {static_cast<uint16_t>(bits | (std::signbit(value) ? 0x8000 : 0))};
}
