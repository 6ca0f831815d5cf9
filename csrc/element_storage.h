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
  static LRS_HOST_DEVICE float load(Value value, int16_t low) { return join(value, low); }
  static LRS_HOST_DEVICE void store(Value& target, int16_t& low, float value, uint32_t) {
    split(value, target, low);
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

  template <bool kIsRoot>
  static LRS_HOST_DEVICE uint32_t encode(float multiple, uint32_t random) {
    return kIsRoot ? encode_root(multiple, random) : encode_signed(multiple, random);
  }
};

// Whether an update of elements that are kept so rounds anything at random.
template <int kNumStates, typename Param, typename State>
inline constexpr bool kRoundsAtRandom = Param::kIsRandom || (State::kIsRandom && kNumStates > 0);

}  // namespace LRS_ISA
}  // namespace lrs
