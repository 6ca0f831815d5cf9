#include "step_cpu.h"

#include <omp.h>

#include <algorithm>

namespace lrs {
namespace {

// Below this many elements a parallel region costs more than it saves.
constexpr int64_t kSerialElements = 32768;

struct InstructionSet {
  const char* name;
  ChunkLoop *step_chunks, *lamb_moments, *lamb_params;
};

InstructionSet best_instruction_set() {
#ifdef LRS_X86_ISAS
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
      __builtin_cpu_supports("fma")) {
    return {"avx512", avx512::step_chunks, avx512::lamb_moments, avx512::lamb_params};
  }
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) {
    return {"avx2", avx2::step_chunks, avx2::lamb_moments, avx2::lamb_params};
  }
#endif
  return {"baseline", baseline::step_chunks, baseline::lamb_moments, baseline::lamb_params};
}

const InstructionSet& instruction_set() {
  static const InstructionSet set = best_instruction_set();
  return set;
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
  *table.step += 1;
}

}  // namespace

std::string cpu_instruction_set() { return instruction_set().name; }

void step_cpu(const StepTable& table, const void* const* gradients, int num_threads) {
  int64_t elements = 0;
  bool has_gradient = false;
  for (int64_t i = 0; i < table.num_tensors; ++i) {
    if (gradients[i] == nullptr) continue;
    has_gradient = true;
    elements += table.tensors[i].numel;
  }
  if (!has_gradient) return;
  const auto visit_chunks = [&](ChunkLoop* loop) {
    if (num_threads <= 1 || elements <= kSerialElements) {
      loop(table, gradients, 0, table.num_chunks);
      return;
    }
#pragma omp parallel num_threads(num_threads)
    {
      const int64_t thread = omp_get_thread_num();
      const int64_t threads = omp_get_num_threads();
      loop(table, gradients, table.num_chunks * thread / threads,
           table.num_chunks * (thread + 1) / threads);
    }
  };
  if (table.algorithm == Algorithm::kLAMB) {
    visit_chunks(instruction_set().lamb_moments);
    sum_squares(table);
    visit_chunks(instruction_set().lamb_params);
  } else {
    visit_chunks(instruction_set().step_chunks);
  }
  commit(table, gradients);
}

}  // namespace lrs
