// Schedules: a profile on [0, 1], a warm-up, a floor and a sampling rate.
//
// The only place that knows what a schedule is worth at a step. Host calls, CPU fills and CUDA
// fills all come here.
#pragma once

#include <cmath>

#include "host_device.h"

namespace lrs {

enum class Profile : int32_t { kConstant, kLinear, kCosine, kRex };

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
  double d;  // kRex: 0.5 is the paper's curve, 0 is linear
};

inline namespace LRS_ISA {

// f(p), p in [0, 1]; f(0) = 1.
LRS_HOST_DEVICE double profile_value(const ScheduleSpec& schedule, double progress) {
  switch (schedule.profile) {
    case Profile::kLinear:
      return 1.0 - progress;
    case Profile::kCosine:
      return 0.5 * (1.0 + cos(3.14159265358979323846 * progress));
    case Profile::kRex:
      // arXiv 2107.04197, section 4.1, with d for its 1/2.
      return (1.0 - progress) / (1.0 - schedule.d * progress);
    case Profile::kConstant:
      break;
  }
  return 1.0;
}

// The last update at or before `update` at which the profile is sampled.
LRS_HOST_DEVICE int64_t sampled_update(const ScheduleSpec& schedule, int64_t update) {
  if (schedule.sample_points == nullptr) return update - update % schedule.sampling;
  int64_t first = 0, last = schedule.num_sample_points;  // first point past `update` is in between
  while (first < last) {
    const int64_t middle = (first + last) / 2;
    if (schedule.sample_points[middle] <= update) {
      first = middle + 1;
    } else {
      last = middle;
    }
  }
  return first == 0 ? 0 : schedule.sample_points[first - 1];
}

// The learning rate of update `step`. Boundaries: the warm-up ends at `lr` exactly, the next update
// starts at f(0), and from `total_steps` on f(1) holds.
LRS_HOST_DEVICE double schedule_value(const ScheduleSpec& schedule, int64_t step) {
  if (step < schedule.warmup_steps) {
    const double ramp = static_cast<double>(step + 1) / static_cast<double>(schedule.warmup_steps);
    return schedule.lr * ramp;
  }
  double progress = 0.0;
  if (schedule.total_steps >= 0) {
    const int64_t update = step - schedule.warmup_steps;
    const int64_t budget = schedule.total_steps - schedule.warmup_steps;
    progress = update >= budget ? 1.0
                                : static_cast<double>(sampled_update(schedule, update)) /
                                      static_cast<double>(budget);
  }
  const double f = profile_value(schedule, progress);
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

// Writes the values of updates first, first + 1, ... to `values`.
template <typename T>
void fill_schedule(const ScheduleSpec& schedule, int64_t first, int64_t count, T* values) {
#pragma omp parallel for if (count > 100000)
  for (int64_t i = 0; i < count; ++i) {
    values[i] = static_cast<T>(schedule_value(schedule, first + i));
  }
}

}  // namespace lrs
