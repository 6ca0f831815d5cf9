// How one parameter and one state are kept, as template arguments of the element loops.
#pragma once

#include "random_bits.h"
#include "storage.h"

namespace lrs {
inline namespace LRS_ISA {

// Parameters. `low` is the low half of a split parameter; `random` has 16 random bits.

template <typename T>
struct NearestParam {
  using Value = T;
  static constexpr bool kIsRandom = false;
  static constexpr bool kIsSplit = false;
  static LRS_HOST_DEVICE float load(Value value, int16_t) { return lrs::load(value); }
  static LRS_HOST_DEVICE void store(Value& target, int16_t&, float value, uint32_t) {
    lrs::store(target, value);
  }
};

struct StochasticParam {
  using Value = BFloat16;
  static constexpr bool kIsRandom = true;
  static constexpr bool kIsSplit = false;
  static LRS_HOST_DEVICE float load(Value value, int16_t) { return lrs::load(value); }
  static LRS_HOST_DEVICE void store(Value& target, int16_t&, float value, uint32_t random) {
    store_stochastic(target, value, random);
  }
};

struct SplitParam {
  using Value = BFloat16;
  static constexpr bool kIsRandom = false;
  static constexpr bool kIsSplit = true;
  static LRS_HOST_DEVICE float load(Value value, int16_t low) {
    return join(uint32_t{bits_of(value)} << 16, low);
  }
  static LRS_HOST_DEVICE void store(Value& target, int16_t& low, float value, uint32_t) {
    uint32_t high_word, low_word;
    split(value, high_word, low_word);
    target = bfloat16_of(high_word >> 16);
    low = static_cast<int16_t>(low_word & 0xffffu);
  }
};

// States. Those that are not float32 round stochastically: a moving average that moves by less than
// half a rounding step each time would otherwise stand still. `random` has 16 random bits.

struct Float32State {
  using Value = float;
  static constexpr StateType kType = StateType::kFloat32;
  static constexpr bool kIsRandom = false;
  static LRS_HOST_DEVICE void store(Value& target, float value, uint32_t) { target = value; }
};

struct BFloat16State {
  using Value = BFloat16;
  static constexpr StateType kType = StateType::kBFloat16;
  static constexpr bool kIsRandom = true;
  static LRS_HOST_DEVICE void store(Value& target, float value, uint32_t random) {
    store_stochastic(target, value, random);
  }
};

// Codes, with a scale for each block. Of the mean of squares it is the root.
struct Block8State {
  using Value = uint8_t;
  static constexpr StateType kType = StateType::kBlock8;
  static constexpr bool kIsRandom = true;

  template <bool kIsRoot, int kByte = 0>
  static LRS_HOST_DEVICE float decode(uint32_t word, float scale) {
    return (kIsRoot ? decode_root<kByte>(word) : decode_signed<kByte>(word)) * scale;
  }

  // The code is the top byte of the result.
  template <bool kIsRoot>
  static LRS_HOST_DEVICE uint32_t encode(float multiple, uint32_t random) {
    if constexpr (kIsRoot) {
      return coded_root(multiple, random) << 5;
    } else {
      const uint32_t sign = to_bits(multiple) & 0x80000000u;
      return sign | (coded_magnitude(multiple, random) << 4 & 0x7fffffffu);
    }
  }
};

// Whether an update of elements that are kept so rounds anything at random.
template <int kNumStates, typename Param, typename State>
inline constexpr bool kRoundsAtRandom = Param::kIsRandom || (State::kIsRandom && kNumStates > 0);

}  // namespace LRS_ISA
}  // namespace lrs
