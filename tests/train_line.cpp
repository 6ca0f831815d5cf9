// Fits y = 2x + 1 with AdamW and a REX schedule: the core from C++, without Python or torch.
#include <cmath>
#include <cstdio>
#include <vector>

#include "schedules.h"
#include "step_cpu.h"

int main() {
  // The schedule buffer: one value per update and one that holds after the end.
  constexpr int64_t kSteps = 300;
  lrs::ScheduleSpec rex{};
  rex.profile = lrs::Profile::kRex;
  rex.shape = 0.5;  // d
  rex.lr = 0.1;
  rex.total_steps = kSteps;
  rex.warmup_steps = 10;
  rex.sampling = 1;
  std::vector<float> learning_rates(kSteps + 1);
  lrs::fill_schedule(rex, 0, kSteps + 1, learning_rates.data());

  lrs::Group adamw{};
  adamw.lr = learning_rates.data();
  adamw.capacity = kSteps + 1;
  adamw.hyper[lrs::kBeta1] = 0.9;
  adamw.hyper[lrs::kBeta2] = 0.99;
  adamw.hyper[lrs::kEps] = 1e-8;
  adamw.hyper[lrs::kWeightDecay] = 1e-4;
  adamw.hyper[lrs::kDecoupled] = 1.0;

  // Two tensors of one element with their states, in one group, and the work cut into chunks.
  float slope[4] = {}, intercept[4] = {};  // value, exp_avg, exp_avg_sq, step
  std::vector<lrs::TensorEntry> tensors;
  for (float* p : {slope, intercept}) {
    lrs::TensorEntry tensor{};  // a float32 of group 0
    tensor.param = p;
    tensor.states[0] = p + 1;
    tensor.states[1] = p + 2;
    tensor.step = p + 3;
    tensor.numel = 1;
    tensors.push_back(tensor);
  }
  lrs::StepTable table{};
  table.chunk_elements = 8192;
  std::vector<lrs::Chunk> chunks;
  std::vector<int64_t> offsets;
  lrs::build_chunks({1, 1}, table.chunk_elements, &chunks, &offsets);

  int64_t step = 0;
  table.algorithm = lrs::Algorithm::kAdam;
  table.tensors = tensors.data();
  table.num_tensors = 2;
  table.groups = &adamw;
  table.chunks = chunks.data();
  table.num_chunks = static_cast<int64_t>(chunks.size());
  table.step = &step;

  while (step < kSteps) {
    float gradients[2] = {};  // of the mean squared error over x = -1, -0.9, ..., 1
    for (int i = -10; i <= 10; ++i) {
      const float x = 0.1f * static_cast<float>(i);
      const float error = slope[0] * x + intercept[0] - (2.0f * x + 1.0f);
      gradients[0] += 2.0f * error * x / 21.0f;
      gradients[1] += 2.0f * error / 21.0f;
    }
    const void* const addresses[2] = {&gradients[0], &gradients[1]};
    lrs::step_cpu(table, addresses, /*num_threads=*/1);  // advances `step`
  }
  std::printf("y = %.4f x + %.4f after %lld steps\n", slope[0], intercept[0],
              static_cast<long long>(step));
  return std::fabs(slope[0] - 2.0f) + std::fabs(intercept[0] - 1.0f) < 1e-2f ? 0 : 1;
}
