#include "step_cpu.h"

#include <omp.h>

#include <cmath>

namespace lrs {
namespace {

// Below this many elements a parallel region costs more than it saves.
constexpr int64_t kSerialElements = 32768;

struct InstructionSet {
  const char* name;
  void (*step_chunks)(const StepTable&, const void* const*, int64_t, int64_t);
  void (*square_chunks)(const StepTable&, const void* const*, int64_t, int64_t, double*);
};

InstructionSet best_instruction_set() {
#ifdef LRS_X86_ISAS
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
      __builtin_cpu_supports("fma")) {
    return {"avx512", avx512::step_chunks, avx512::square_chunks};
  }
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) {
    return {"avx2", avx2::step_chunks, avx2::square_chunks};
  }
#endif
  return {"baseline", baseline::step_chunks, baseline::square_chunks};
}

const InstructionSet& instruction_set() {
  static const InstructionSet set = best_instruction_set();
  return set;
}

// The elements that have a gradient, -1 if no tensor has one.
int64_t count_elements(const StepTable& table, const void* const* gradients) {
  int64_t elements = -1;
  for (int64_t i = 0; i < table.num_tensors; ++i) {
    if (gradients[i] == nullptr) continue;
    elements = (elements < 0 ? 0 : elements) + table.tensors[i].numel;
  }
  return elements;
}

// Calls body(first, last) for contiguous parts of the chunks, one a thread.
template <typename Body>
void split_chunks(const StepTable& table, int64_t elements, int num_threads, const Body& body) {
  if (num_threads <= 1 || elements <= kSerialElements) {
    body(0, table.num_chunks);
    return;
  }
#pragma omp parallel num_threads(num_threads)
  {
    const int64_t thread = omp_get_thread_num();
    const int64_t threads = omp_get_num_threads();
    body(table.num_chunks * thread / threads, table.num_chunks * (thread + 1) / threads);
  }
}

void commit(const StepTable& table, const void* const* gradients) {
  for (int64_t i = 0; i < table.num_tensors; ++i) {
    if (gradients[i] != nullptr) *table.tensors[i].step += 1.0f;
  }
  *table.step += 1;
}

}  // namespace

std::string cpu_instruction_set() { return instruction_set().name; }

void step_cpu(const StepTable& table, const void* const* gradients, int num_threads) {
  const int64_t elements = count_elements(table, gradients);
  if (elements < 0 || is_skipped(table.scaling)) return;
  const auto step_chunks = instruction_set().step_chunks;
  split_chunks(table, elements, num_threads,
               [&](int64_t first, int64_t last) { step_chunks(table, gradients, first, last); });
  commit(table, gradients);
}

float grad_norm_cpu(const StepTable& table, const void* const* gradients, double* sums,
                    int num_threads) {
  const auto square_chunks = instruction_set().square_chunks;
  split_chunks(
      table, count_elements(table, gradients), num_threads,
      [&](int64_t first, int64_t last) { square_chunks(table, gradients, first, last, sums); });
  double sum = 0.0;
  for (int64_t i = 0; i < table.num_chunks; ++i) sum += sums[i];
  return static_cast<float>(std::sqrt(sum));
}

}  // namespace lrs
