// Elements by pairs, for loops in which each 32-bit lane of a vector has two neighbours: what is
// stored in 16 or 8 bits is unpacked and packed without moving between lanes, of which CPUs do
// less at a time than of arithmetic.
#pragma once

#include <cstring>
#include <type_traits>

#include "element_storage.h"

namespace lrs {
inline namespace LRS_ISA {

struct Pair {
  float even, odd;
};

// Number i of the words that lie in an array of smaller values, aligned for words or not.
template <typename Word>
LRS_HOST_DEVICE uint32_t load_word(const void* values, int32_t i) {
  Word word;
  std::memcpy(&word, static_cast<const char*>(values) + sizeof(word) * i, sizeof(word));
  return word;
}

template <typename Word>
LRS_HOST_DEVICE void store_word(void* values, int32_t i, uint32_t bits) {
  const Word word = static_cast<Word>(bits);
  std::memcpy(static_cast<char*>(values) + sizeof(word) * i, &word, sizeof(word));
}

LRS_HOST_DEVICE uint32_t high_halves(uint32_t even, uint32_t odd) {
  return (even >> 16) | (odd & 0xffff0000u);
}

LRS_HOST_DEVICE uint32_t low_halves(uint32_t even, uint32_t odd) {
  return (even & 0xffffu) | (odd << 16);
}

LRS_HOST_DEVICE Pair load_pair(const float* values, int32_t i) {
  return {values[2 * i], values[2 * i + 1]};
}

LRS_HOST_DEVICE Pair load_pair(const BFloat16* values, int32_t i) {
  const uint32_t word = load_word<uint32_t>(values, i);
  return {from_bits(word << 16), from_bits(word & 0xffff0000u)};
}

// `random` has 16 random bits for each of the pair, as random_pair gives them.
LRS_HOST_DEVICE void store_stochastic_pair(BFloat16* values, int32_t i, Pair pair,
                                           uint32_t random) {
  const uint32_t even = rounded_at_random(pair.even, random & 0xffffu);
  const uint32_t odd = rounded_at_random(pair.odd, random >> 16);
  store_word<uint32_t>(values, i, high_halves(even, odd));
}

template <typename Param>
LRS_HOST_DEVICE Pair load_param_pair(const typename Param::Value* param, const int16_t* remainder,
                                     int32_t i) {
  if constexpr (Param::kIsSplit) {
    const uint32_t high = load_word<uint32_t>(param, i);
    const uint32_t low = load_word<uint32_t>(remainder, i);
    return {join(high << 16, static_cast<int32_t>(low << 16) >> 16),
            join(high & 0xffff0000u, static_cast<int32_t>(low) >> 16)};
  } else {
    return load_pair(param, i);
  }
}

template <typename Param>
LRS_HOST_DEVICE void store_param_pair(typename Param::Value* param, int16_t* remainder, int32_t i,
                                      Pair pair, uint32_t random) {
  if constexpr (std::is_same_v<typename Param::Value, float>) {
    param[2 * i] = pair.even;
    param[2 * i + 1] = pair.odd;
  } else if constexpr (Param::kIsSplit) {
    uint32_t even_high, even_low, odd_high, odd_low;
    split(pair.even, even_high, even_low);
    split(pair.odd, odd_high, odd_low);
    store_word<uint32_t>(param, i, high_halves(even_high, odd_high));
    store_word<uint32_t>(remainder, i, low_halves(even_low, odd_low));
  } else if constexpr (Param::kIsRandom) {
    store_stochastic_pair(param, i, pair, random);
  } else {
    const uint32_t even = rounded_to_nearest(pair.even), odd = rounded_to_nearest(pair.odd);
    store_word<uint32_t>(param, i, high_halves(even, odd));
  }
}

template <bool kIsRoot>
LRS_HOST_DEVICE Pair decode_pair(const uint8_t* codes, int32_t i, float scale) {
  const uint32_t word = load_word<uint16_t>(codes, i);
  return {Block8State::decode<kIsRoot, 0>(word, scale),
          Block8State::decode<kIsRoot, 1>(word, scale)};
}

// `factor` makes multiples of the scale.
template <bool kIsRoot>
LRS_HOST_DEVICE void encode_pair(uint8_t* codes, int32_t i, Pair pair, float factor,
                                 uint32_t random) {
  const float even_multiple = pair.even * factor, odd_multiple = pair.odd * factor;
  const uint32_t even_random = random & 0xffffu, odd_random = random >> 16;
  if constexpr (kIsRoot) {
    const uint32_t even = coded_root(even_multiple, even_random);
    const uint32_t odd = coded_root(odd_multiple, odd_random);
    store_word<uint16_t>(codes, i, (even >> 19 & 0xffu) | (odd >> 11 & 0xff00u));
  } else {
    const uint32_t even = coded_magnitude(even_multiple, even_random) >> 20 & 0x7fu;
    const uint32_t odd = coded_magnitude(odd_multiple, odd_random) >> 12 & 0x7f00u;
    const uint32_t even_sign = to_bits(even_multiple) >> 24 & 0x80u;
    const uint32_t odd_sign = to_bits(odd_multiple) >> 16 & 0x8000u;
    store_word<uint16_t>(codes, i, even | odd | even_sign | odd_sign);
  }
}

}  // namespace LRS_ISA
}  // namespace lrs
