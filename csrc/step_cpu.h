// The CPU backend.
#pragma once

#include <string>

#include "tensor_table.h"

namespace lrs {

// Updates every tensor whose gradient is not null, then commits the step. `gradients` has one
// address per tensor of the table. A table without gradients changes nothing.
void step_cpu(const StepTable& table, const void* const* gradients, int num_threads);

// Returns the 2-norm of all gradients as they are stored. `sums` has room for one number per chunk.
// The order of additions depends on nothing but the table.
float grad_norm_cpu(const StepTable& table, const void* const* gradients, double* sums,
                    int num_threads);

// The instruction set in use: "avx512", "avx2" or "baseline".
std::string cpu_instruction_set();

// Visit the chunks [first, last) of the table, one build per instruction set: an update of
// updates.h, one of the two passes of LAMB, or the sums of the squares of the gradients, one a
// chunk.
using ChunkLoop = void(const StepTable& table, const void* const* gradients, int64_t first,
                       int64_t last);
using SquareLoop = void(const StepTable& table, const void* const* gradients, int64_t first,
                        int64_t last, double* sums);
namespace baseline {
ChunkLoop step_chunks, lamb_moments, lamb_params;
SquareLoop square_chunks;
}  // namespace baseline
#ifdef LRS_X86_ISAS
namespace avx2 {
ChunkLoop step_chunks, lamb_moments, lamb_params;
SquareLoop square_chunks;
}  // namespace avx2
namespace avx512 {
ChunkLoop step_chunks, lamb_moments, lamb_params;
SquareLoop square_chunks;
}  // namespace avx512
#endif

}  // namespace lrs
