// Random bits for stochastic rounding: a function of the step, the tensor and the element, so that
// a run can be repeated, resumed and replayed, and every backend draws the same.
#pragma once

#include "host_device.h"

namespace lrs {
inline namespace LRS_ISA {

inline constexpr uint32_t kKeyStep = 0x9e3779b9u;  // 2^32 over the golden ratio: odd, no pattern

// A bijection in which every bit of the result depends on every bit of `bits`; constants: Wellons,
// Prospecting for hash functions, 2018 ("lowbias32").
LRS_HOST_DEVICE uint32_t scrambled(uint32_t bits) {
  bits = (bits ^ (bits >> 16)) * 0x7feb352du;
  bits = (bits ^ (bits >> 15)) * 0x846ca68bu;
  return bits ^ (bits >> 16);
}

LRS_HOST_DEVICE uint32_t high_half(int64_t value) {
  return static_cast<uint32_t>(static_cast<uint64_t>(value) >> 32);
}

// The key of the elements of the tensor at `position` in one step, from element `first` on, as far
// as the indices of their pairs have the same high half.
LRS_HOST_DEVICE uint32_t random_key(int64_t step, int64_t position, int64_t first) {
  uint32_t key = scrambled(static_cast<uint32_t>(step) + kKeyStep);
  key = scrambled(key ^ high_half(step));
  key = scrambled(key + static_cast<uint32_t>(position));
  return key ^ scrambled(high_half(first >> 1));
}

// The key with which elements are counted from the one at `first` on, which must be even.
LRS_HOST_DEVICE uint32_t key_from(uint32_t key, int64_t first) {
  return key + static_cast<uint32_t>(first >> 1) * kKeyStep;
}

// 16 random bits for each of the elements 2 * pair, in the low half, and 2 * pair + 1. All that is
// rounded of one element takes the same: each number is right on average all the same.
LRS_HOST_DEVICE uint32_t random_pair(uint32_t key, uint32_t pair) {
  return scrambled(pair * kKeyStep + key);
}

// Those of one element.
LRS_HOST_DEVICE uint32_t random_bits(uint32_t key, uint32_t element) {
  return random_pair(key, element >> 1) >> (element % 2 * 16) & 0xffffu;
}

}  // namespace LRS_ISA
}  // namespace lrs
