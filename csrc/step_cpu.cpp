#include "step_cpu.h"

#include <algorithm>
#include <cmath>
#include <vector>

#include "forked_threads.h"

#ifdef LRS_X86_ISAS
#include <cpuid.h>
#endif

namespace lrs {
namespace {

// Below this many elements a parallel region costs more than it saves.
constexpr int64_t kSerialElements = 32768;
// What a tensor costs besides its elements, in elements: some 100 ns on a Xeon.
constexpr int64_t kTensorCost = 256;

struct InstructionSet {
  const char* name;
  ChunkLoop *step_chunks, *lamb_moments, *lamb_params;
  SquareLoop* square_chunks;
};

#ifdef LRS_X86_ISAS
// Older clangs do not know it in __builtin_cpu_supports.
bool has_f16c() {
  unsigned eax, ebx, ecx, edx;
  return __get_cpuid(1, &eax, &ebx, &ecx, &edx) != 0 && (ecx & bit_F16C) != 0;
}
#endif

InstructionSet best_instruction_set() {
#ifdef LRS_X86_ISAS
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
      __builtin_cpu_supports("fma") && has_f16c()) {
    return {"avx512", avx512::step_chunks, avx512::lamb_moments, avx512::lamb_params,
            avx512::square_chunks};
  }
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && has_f16c()) {
    return {"avx2", avx2::step_chunks, avx2::lamb_moments, avx2::lamb_params, avx2::square_chunks};
  }
#endif
  return {"baseline", baseline::step_chunks, baseline::lamb_moments, baseline::lamb_params,
          baseline::square_chunks};
}

const InstructionSet& instruction_set() {
  static const InstructionSet set = best_instruction_set();
  return set;
}

// The tensors that have a gradient, and their elements.
struct Work {
  int64_t tensors = 0, elements = 0;

  int64_t cost() const { return kTensorCost * tensors + elements; }
};

Work work_in(const StepTable& table, const void* const* gradients) {
  Work work;
  for (int64_t i = 0; i < table.num_tensors; ++i) {
    if (gradients[i] == nullptr) continue;
    ++work.tensors;
    work.elements += table.tensors[i].numel;
  }
  return work;
}

// Cuts the chunks into parts of about as much work: the first chunk of each, and the end.
std::vector<int64_t> equal_parts(const StepTable& table, const void* const* gradients, int64_t cost,
                                 int num_parts) {
  std::vector<int64_t> parts{0};
  int64_t before = 0, chunk = 0;
  for (int64_t i = 0; i < table.num_tensors; ++i) {
    const int64_t numel = table.tensors[i].numel;
    const int64_t after = before + (gradients[i] == nullptr ? 0 : Work{1, numel}.cost());
    const int64_t num_chunks = num_chunks_of(numel, table.chunk_elements);
    while (static_cast<int>(parts.size()) < num_parts) {
      const int64_t begin = cost * static_cast<int64_t>(parts.size()) / num_parts;
      if (begin >= after) break;
      parts.push_back(chunk + (begin - before) * num_chunks / (after - before));
    }
    before = after;
    chunk += num_chunks;
  }
  parts.resize(static_cast<size_t>(num_parts) + 1, table.num_chunks);
  return parts;
}

// Calls body(first, last) for contiguous parts of the chunks, one a thread.
template <typename Body>
void split_chunks(const StepTable& table, const void* const* gradients, const Work& work,
                  int num_threads, const Body& body) {
  if (num_threads <= 1 || work.elements <= kSerialElements || !take_threads()) {
    body(0, table.num_chunks);
    return;
  }
  const std::vector<int64_t> parts = equal_parts(table, gradients, work.cost(), num_threads);
#pragma omp parallel for num_threads(num_threads) schedule(static, 1)
  for (int part = 0; part < num_threads; ++part) {
    body(parts[static_cast<size_t>(part)], parts[static_cast<size_t>(part) + 1]);
  }
}

// Adds up what the first pass of LAMB has left for each chunk, in order.
void sum_squares(const StepTable& table) {
  std::fill(table.tensor_squares, table.tensor_squares + table.num_tensors, Squares{});
  for (int64_t i = 0; i < table.num_chunks; ++i) {
    Squares& tensor = table.tensor_squares[table.chunks[i].tensor];
    tensor.param += table.chunk_squares[i].param;
    tensor.direction += table.chunk_squares[i].direction;
  }
}

void commit(const StepTable& table, const void* const* gradients) {
  for (int64_t i = 0; i < table.num_tensors; ++i) {
    if (gradients[i] != nullptr) *table.tensors[i].step += 1.0f;
  }
  if (table.commits_step) *table.step += 1;
}

}  // namespace

std::string cpu_instruction_set() { return instruction_set().name; }

void step_cpu(const StepTable& table, const void* const* gradients, int num_threads) {
  const Work work = work_in(table, gradients);
  if (work.tensors == 0 || is_skipped(table.scaling)) return;
  const auto visit_chunks = [&](ChunkLoop* loop) {
    split_chunks(table, gradients, work, num_threads,
                 [&](int64_t first, int64_t last) { loop(table, gradients, first, last); });
  };
  if (table.algorithm == Algorithm::kLAMB) {
    if (table.passes != Passes::kParams) {
      visit_chunks(instruction_set().lamb_moments);
      sum_squares(table);
    }
    if (table.passes == Passes::kMoments) return;
    visit_chunks(instruction_set().lamb_params);
  } else {
    visit_chunks(instruction_set().step_chunks);
  }
  commit(table, gradients);
}

float grad_norm_cpu(const StepTable& table, const void* const* gradients, double* sums,
                    int num_threads) {
  const auto square_chunks = instruction_set().square_chunks;
  split_chunks(
      table, gradients, work_in(table, gradients), num_threads,
      [&](int64_t first, int64_t last) { square_chunks(table, gradients, first, last, sums); });
  double sum = 0.0;
  for (int64_t i = 0; i < table.num_chunks; ++i) sum += sums[i];
  return static_cast<float>(std::sqrt(sum));
}

}  // namespace lrs
