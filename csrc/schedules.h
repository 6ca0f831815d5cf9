// Schedules: a profile on [0, 1], a warm-up, a floor and a sampling rate.
//
// The only place that knows what a schedule is worth at a step. Host calls, CPU fills and CUDA
// fills all come here.
#pragma once

#include <algorithm>
#include <cmath>

#include "forked_threads.h"
#include "host_device.h"

namespace lrs {

enum class Profile : int32_t {
  kConstant,
  kLinear,
  kCosine,
  kRex,
  kExponential,
  kStepDecay,
  kDelayedLinear,
  kPolynomial,
  kOneCycle,
  kWarmupStableDecay,
  kInverseSqrt,
  kOneMinusSqrt,
};

constexpr double kCooldownGamma = -3.0;  // of the exponential cool-down, as of the profile

// A schedule in plain numbers. `total_steps` < 0 means that it has no end.
struct ScheduleSpec {
  Profile profile;
  double lr;
  double min_lr;
  int64_t total_steps;
  int64_t warmup_steps;
  int64_t sampling;              // the profile is sampled at every `sampling`-th update
  const int64_t* sample_points;  // or, if not null, at update 0 and at these increasing updates
  int64_t num_sample_points;
  double shape;               // the profile's own number, see `curve_value` and `profile_value`
  const int64_t* milestones;  // kStepDecay: increasing updates
  int64_t num_milestones;
  Profile cooldown;  // kWarmupStableDecay: a profile of `curve_value`
};

inline namespace LRS_ISA {

// base^exponent of a base in [0, 1]. Logarithms in two thirds of the time of `pow`, and wrong by
// about as many roundings as the result is powers of two below 1; the exponents that schedules
// usually have are faster still, and exact.
LRS_HOST_DEVICE double power_of(double base, double exponent) {
  if (exponent == 1.0) return base;
  if (exponent == 2.0) return base * base;
  if (exponent == 0.5) return sqrt(base);
  return exp2(exponent * log2(base));
}

// f(p), p in [0, 1], of the profiles that are one formula of the progress.
LRS_HOST_DEVICE double curve_value(Profile profile, double shape, double progress) {
  switch (profile) {
    case Profile::kLinear:
      return 1.0 - progress;
    case Profile::kCosine:
      return 0.5 * (1.0 + cos(3.14159265358979323846 * progress));
    case Profile::kRex:
      // arXiv 2107.04197, section 4.1, with d = `shape` for its 1/2.
      return (1.0 - progress) / (1.0 - shape * progress);
    case Profile::kExponential:  // gamma = `shape`
      return exp(shape * progress);
    case Profile::kDelayedLinear:  // delay = `shape`
      return progress <= shape ? 1.0 : (1.0 - progress) / (1.0 - shape);
    case Profile::kPolynomial:  // power = `shape`
      return power_of(1.0 - progress, shape);
    case Profile::kOneCycle:  // `shape` at the ends, 1 in the middle
      return shape + (1.0 - shape) * (1.0 - fabs(1.0 - 2.0 * progress));
    case Profile::kOneMinusSqrt:
      return 1.0 - sqrt(progress);
    default:
      return 1.0;
  }
}

// How many of the increasing `points` are at or before `update`.
LRS_HOST_DEVICE int64_t points_passed(const int64_t* points, int64_t count, int64_t update) {
  int64_t first = 0, last = count;  // the first point past `update` is in between
  while (first < last) {
    const int64_t middle = (first + last) / 2;
    if (points[middle] <= update) {
      first = middle + 1;
    } else {
      last = middle;
    }
  }
  return first;
}

// The last update at or before `update` at which the profile is sampled.
LRS_HOST_DEVICE int64_t sampled_update(const ScheduleSpec& schedule, int64_t update) {
  if (schedule.sample_points == nullptr) {
    return schedule.sampling == 1 ? update : update - update % schedule.sampling;
  }
  const int64_t passed = points_passed(schedule.sample_points, schedule.num_sample_points, update);
  return passed == 0 ? 0 : schedule.sample_points[passed - 1];
}

// f at the update number `update` after the warm-up, from 0.
LRS_HOST_DEVICE double profile_value(const ScheduleSpec& schedule, int64_t update) {
  if (schedule.profile == Profile::kConstant) return 1.0;
  if (schedule.profile == Profile::kInverseSqrt) {
    const auto warmup = static_cast<double>(schedule.warmup_steps);
    return sqrt(warmup / (warmup + static_cast<double>(sampled_update(schedule, update)) + 1.0));
  }
  const int64_t budget = schedule.total_steps - schedule.warmup_steps;
  const bool has_ended = update >= budget;
  const int64_t sampled = has_ended ? budget : sampled_update(schedule, update);
  if (schedule.profile == Profile::kStepDecay) {  // gamma = `shape`
    return pow(schedule.shape, static_cast<double>(points_passed(
                                   schedule.milestones, schedule.num_milestones, sampled)));
  }
  const double progress =
      has_ended ? 1.0 : static_cast<double>(sampled) / static_cast<double>(budget);
  if (schedule.profile == Profile::kWarmupStableDecay) {  // the cool-down's share = `shape`
    const double cooled = 1.0 - (1.0 - progress) / schedule.shape;
    // What is 0 but for rounding is 0: the square root would show it.
    return cooled < 1e-12 ? 1.0 : curve_value(schedule.cooldown, kCooldownGamma, cooled);
  }
  return curve_value(schedule.profile, schedule.shape, progress);
}

// The learning rate of update `step`. Boundaries: the warm-up ends at `lr` exactly, the next update
// starts at f(0), and from `total_steps` on f(1) holds.
LRS_HOST_DEVICE double schedule_value(const ScheduleSpec& schedule, int64_t step) {
  if (step < schedule.warmup_steps) {
    const double ramp = static_cast<double>(step + 1) / static_cast<double>(schedule.warmup_steps);
    return schedule.lr * ramp;
  }
  const double f = profile_value(schedule, step - schedule.warmup_steps);
  return f * schedule.lr + (1.0 - f) * schedule.min_lr;
}

}  // namespace LRS_ISA

// The update at which the budget's `fraction` is reached: ceil(fraction * budget), where a product
// that is an integer but for rounding counts as that integer (0.07 * 100 is 7).
inline int64_t sample_point(double fraction, int64_t budget) {
  const double exact = fraction * static_cast<double>(budget);
  const double nearest = std::nearbyint(exact);
  const bool is_integer = std::fabs(exact - nearest) <= 1e-12 * std::fabs(exact);
  return static_cast<int64_t>(is_integer ? nearest : std::ceil(exact));
}

// The first update after `step` at which the schedule may be worth something else, at most `end`.
inline int64_t next_change(const ScheduleSpec& schedule, int64_t step, int64_t end) {
  const int64_t update = step - schedule.warmup_steps;
  if (update < 0) return step + 1;
  int64_t change = end - schedule.warmup_steps;
  if (schedule.total_steps >= 0) {
    const int64_t budget = schedule.total_steps - schedule.warmup_steps;
    if (update >= budget) return end;
    change = std::min(change, budget);
  }
  if (schedule.profile == Profile::kConstant) return schedule.warmup_steps + change;
  if (schedule.sampling > 1) {
    const int64_t left = schedule.sampling - update % schedule.sampling;
    change = update + std::min(change - update, left);
  } else {
    const bool has_points = schedule.sample_points != nullptr;
    const int64_t* points = has_points ? schedule.sample_points : schedule.milestones;
    const int64_t count = has_points ? schedule.num_sample_points : schedule.num_milestones;
    const int64_t passed = points_passed(points, count, update);
    if (passed < count) change = std::min(change, points[passed]);
  }
  return schedule.warmup_steps + change;
}

// Writes the values of updates first, first + 1, ... to `values`.
template <typename T>
void fill_schedule(const ScheduleSpec& schedule, int64_t first, int64_t count, T* values) {
  constexpr int64_t kPart = 1 << 16;
  const bool moves_always = schedule.sampling == 1 && schedule.sample_points == nullptr &&
                            schedule.profile != Profile::kConstant &&
                            schedule.profile != Profile::kStepDecay;
#pragma omp parallel for schedule(dynamic) if (count > kPart && take_threads())
  for (int64_t part = 0; part < count; part += kPart) {
    const int64_t end = std::min(count, part + kPart);
    for (int64_t i = part; i < end;) {
      const auto value = static_cast<T>(schedule_value(schedule, first + i));
      const int64_t change =
          moves_always ? i + 1 : next_change(schedule, first + i, first + end) - first;
      for (; i < change; ++i) values[i] = value;
    }
  }
}

}  // namespace lrs
