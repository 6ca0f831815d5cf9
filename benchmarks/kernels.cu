// Times the step kernels alone: csrc/ without Python, torch or the host path. See bench_kernels.py,
// which compiles and calls it.
//
//     kernels ROUNDS CHUNK...
//
// One line of JSON for each case: what is updated, how long the chunks are, seconds of a step as
// quartiles, and the bytes that it must move. Before each step as many bytes as any cache holds are
// overwritten, so that a step finds nothing of the last one; a copy of the same size comes first.
#include <cuda_runtime.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <string>
#include <vector>

#include "launch.cuh"
#include "step_cuda.h"

namespace {

using lrs::check;

constexpr int64_t kFlushed = int64_t{256} << 20;
constexpr int64_t kCopied = int64_t{1} << 30;

// What is updated: `tensors` parameters of `numel` elements each.
struct Shape {
  const char* name;
  int64_t tensors, numel;
};
const Shape kShapes[] = {{"1 x 64M", 1, int64_t{1} << 26}, {"1 x 16K", 1, 1 << 14},
                         {"1 x 1M", 1, 1 << 20},           {"1 x 8M", 1, 1 << 23},
                         {"300 x 10,000", 300, 10000},     {"300 x 16", 300, 16},
                         {"5,000 x 1,000", 5000, 1000}};

// How a parameter and its two states are kept.
struct Storage {
  const char* name;
  lrs::DType dtype;
  lrs::StateType states;
  bool is_split, is_stochastic;
};
const Storage kStorages[] = {
    {"float32", lrs::DType::kFloat32, lrs::StateType::kFloat32, false, false},
    {"bfloat16, float32 states", lrs::DType::kBFloat16, lrs::StateType::kFloat32, false, false},
    {"bfloat16, all", lrs::DType::kBFloat16, lrs::StateType::kBFloat16, false, true},
    {"split, bfloat16 states", lrs::DType::kBFloat16, lrs::StateType::kBFloat16, true, false},
    {"split, 8-bit states", lrs::DType::kBFloat16, lrs::StateType::kBlock8, true, false},
    {"bfloat16, 8-bit states", lrs::DType::kBFloat16, lrs::StateType::kBlock8, false, true},
};

int64_t state_bytes(lrs::StateType type) {
  return type == lrs::StateType::kFloat32 ? 4 : type == lrs::StateType::kBFloat16 ? 2 : 1;
}

// Device memory in pieces aligned to 256 bytes. Its bytes make floats and bfloat16s of about 0.01.
class Arena {
 public:
  explicit Arena(int64_t bytes) {
    check(cudaMalloc(&base_, bytes), "cudaMalloc");
    check(cudaMemset(base_, 0x3c, bytes), "cudaMemset");
  }
  ~Arena() { cudaFree(base_); }
  Arena(const Arena&) = delete;
  Arena& operator=(const Arena&) = delete;

  template <typename T = void>
  T* take(int64_t bytes) {
    void* piece = base_ + used_;
    used_ += (bytes + 255) / 256 * 256;
    return static_cast<T*>(piece);
  }
  template <typename T>
  T* copy(const std::vector<T>& values) {
    T* piece = take<T>(values.size() * sizeof(T));
    check(cudaMemcpy(piece, values.data(), values.size() * sizeof(T), cudaMemcpyHostToDevice),
          "cudaMemcpy");
    return piece;
  }

 private:
  char* base_ = nullptr;
  int64_t used_ = 0;
};

// Quartiles of the seconds that `call` takes on a device whose caches hold something else.
template <typename Call>
std::string quartiles(int rounds, void* flushed, const Call& call) {
  cudaEvent_t start, end;
  check(cudaEventCreate(&start), "cudaEventCreate");
  check(cudaEventCreate(&end), "cudaEventCreate");
  std::vector<float> seconds;
  for (int round = -2; round < rounds; ++round) {  // two for warming up
    check(cudaMemsetAsync(flushed, round, kFlushed), "cudaMemsetAsync");
    check(cudaEventRecord(start), "cudaEventRecord");
    call();
    check(cudaEventRecord(end), "cudaEventRecord");
    check(cudaEventSynchronize(end), "a step");
    float milliseconds = 0.0f;
    check(cudaEventElapsedTime(&milliseconds, start, end), "cudaEventElapsedTime");
    if (round >= 0) seconds.push_back(milliseconds * 1e-3f);
  }
  cudaEventDestroy(start);
  cudaEventDestroy(end);
  std::sort(seconds.begin(), seconds.end());
  char text[96];
  const auto at = [&](int quarter) { return seconds[(seconds.size() - 1) * quarter / 4]; };
  std::snprintf(text, sizeof text, "[%.4g, %.4g, %.4g]", at(1), at(2), at(3));
  return text;
}

void time_steps(const Shape& shape, const Storage& storage, int64_t chunk, int rounds,
                void* flushed) {
  const int64_t param_bytes = storage.dtype == lrs::DType::kFloat32 ? 4 : 2;
  const int64_t kept = state_bytes(storage.states);
  const int64_t blocks = lrs::num_chunks_of(shape.numel, lrs::kQuantBlock);
  const int64_t bytes_each = 2 * param_bytes + 2 * kept + 2 * storage.is_split;
  Arena arena(shape.tensors * (shape.numel * bytes_each + blocks * 8 + 8 * 256) +
              shape.tensors * 512 + shape.numel / chunk * 16 * shape.tensors + (1 << 20));
  std::vector<lrs::TensorEntry> entries(shape.tensors);
  std::vector<const void*> gradients;
  for (lrs::TensorEntry& entry : entries) {
    entry = {};
    entry.param = arena.take(shape.numel * param_bytes);
    gradients.push_back(arena.take(shape.numel * param_bytes));
    for (int s = 0; s < 2; ++s) {
      entry.states[s] = arena.take(shape.numel * kept);
      if (storage.states == lrs::StateType::kBlock8) {
        entry.scales[s] = arena.take<float>(blocks * sizeof(float));
      }
    }
    if (storage.is_split) entry.remainder = arena.take<int16_t>(shape.numel * 2);
    entry.step = arena.copy(std::vector<float>{1000.0f});
    entry.numel = shape.numel;
    entry.dtype = storage.dtype;
    entry.position = &entry - entries.data();
  }
  lrs::Group group{arena.copy(std::vector<float>{1e-3f}), 1, {}, {}, {}};
  group.hyper[lrs::kBeta1] = 0.9;
  group.hyper[lrs::kBeta2] = 0.999;
  group.hyper[lrs::kEps] = 1e-8;
  group.hyper[lrs::kDecoupled] = 1.0;
  std::vector<lrs::Chunk> chunks;
  std::vector<int64_t> offsets;
  lrs::build_chunks(std::vector<int64_t>(shape.tensors, shape.numel), chunk, &chunks, &offsets);
  lrs::StepTable table{};
  table.algorithm = lrs::Algorithm::kAdam;
  table.state_type = storage.states;
  table.rounds_stochastically = storage.is_stochastic;
  table.tensors = arena.copy(entries);
  table.host_tensors = entries.data();
  table.num_tensors = shape.tensors;
  table.groups = arena.copy(std::vector<lrs::Group>{group});
  table.chunks = arena.copy(chunks);
  table.num_chunks = static_cast<int64_t>(chunks.size());
  table.chunk_elements = chunk;
  table.step = arena.copy(std::vector<int64_t>{1000});
  table.ticket = arena.copy(std::vector<uint32_t>{0});
  const std::string seconds = quartiles(rounds, flushed, [&] {
    lrs::step_cuda(table, offsets.data(), gradients.data(), 0, nullptr);
  });
  // The gradient is only read.
  const double moved = 3 * param_bytes + 4 * kept + 4 * storage.is_split +
                       (storage.states == lrs::StateType::kBlock8 ? 16.0 / lrs::kQuantBlock : 0.0);
  std::printf(
      "{\"shape\": \"%s\", \"storage\": \"%s\", \"chunk\": %lld, \"seconds\": %s, "
      "\"bytes\": %.0f}\n",
      shape.name, storage.name, static_cast<long long>(chunk), seconds.c_str(),
      moved * static_cast<double>(shape.tensors * shape.numel));
  std::fflush(stdout);
}

void time_copy(int rounds, void* flushed) {
  Arena arena(2 * kCopied + 512);
  void* source = arena.take(kCopied);
  void* target = arena.take(kCopied);
  const std::string seconds = quartiles(rounds, flushed, [&] {
    check(cudaMemcpyAsync(target, source, kCopied, cudaMemcpyDeviceToDevice), "cudaMemcpyAsync");
  });
  std::printf(
      "{\"shape\": \"copy\", \"storage\": \"\", \"chunk\": 0, \"seconds\": %s, "
      "\"bytes\": %.0f}\n",
      seconds.c_str(), 2.0 * kCopied);
}

}  // namespace

int main(int argc, char** argv) {
  if (argc < 3) {
    std::fprintf(stderr, "usage: kernels ROUNDS CHUNK...\n");
    return 2;
  }
  const int rounds = std::atoi(argv[1]);
  try {
    Arena flushed(kFlushed);
    void* memory = flushed.take(kFlushed);
    time_copy(rounds, memory);
    for (const Shape& shape : kShapes) {
      for (const Storage& storage : kStorages) {
        for (int i = 2; i < argc; ++i) {
          time_steps(shape, storage, std::atoll(argv[i]), rounds, memory);
        }
      }
    }
  } catch (const std::exception& error) {
    std::fprintf(stderr, "%s\n", error.what());
    return 1;
  }
  return 0;
}
