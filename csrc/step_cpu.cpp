#include "step_cpu.h"

#include <omp.h>

namespace lrs {
namespace {

// Below this many elements a parallel region costs more than it saves.
constexpr int64_t kSerialElements = 32768;

struct InstructionSet {
  const char* name;
  void (*step_chunks)(const StepTable&, const void* const*, int64_t, int64_t);
};

InstructionSet best_instruction_set() {
#ifdef LRS_X86_ISAS
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
      __builtin_cpu_supports("fma")) {
    return {"avx512", avx512::step_chunks};
  }
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) {
    return {"avx2", avx2::step_chunks};
  }
#endif
  return {"baseline", baseline::step_chunks};
}

const InstructionSet& instruction_set() {
  static const InstructionSet set = best_instruction_set();
  return set;
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
  const auto step_chunks = instruction_set().step_chunks;
  int64_t elements = 0;
  bool has_gradient = false;
  for (int64_t i = 0; i < table.num_tensors; ++i) {
    if (gradients[i] == nullptr) continue;
    has_gradient = true;
    elements += table.tensors[i].numel;
  }
  if (!has_gradient) return;
  if (num_threads <= 1 || elements <= kSerialElements) {
    step_chunks(table, gradients, 0, table.num_chunks);
  } else {
#pragma omp parallel num_threads(num_threads)
    {
      const int64_t thread = omp_get_thread_num();
      const int64_t threads = omp_get_num_threads();
      step_chunks(table, gradients, table.num_chunks * thread / threads,
                  table.num_chunks * (thread + 1) / threads);
    }
  }
  commit(table, gradients);
}

}  // namespace lrs
