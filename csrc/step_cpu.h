// The CPU backend.
#pragma once

#include <string>

#include "tensor_table.h"

namespace lrs {

// Updates every tensor whose gradient is not null, then commits the step. `gradients` has one
// address per tensor of the table. A table without gradients changes nothing.
void step_cpu(const StepTable& table, const void* const* gradients, int num_threads);

// The instruction set in use: "avx512", "avx2" or "baseline".
std::string cpu_instruction_set();

// Visits the chunks [first, last) of the table, one build per instruction set: an update of
// updates.h, or one of the two passes of LAMB.
using ChunkLoop = void(const StepTable& table, const void* const* gradients, int64_t first,
                       int64_t last);
namespace baseline {
ChunkLoop step_chunks, lamb_moments, lamb_params;
}
#ifdef LRS_X86_ISAS
namespace avx2 {
ChunkLoop step_chunks, lamb_moments, lamb_params;
}
namespace avx512 {
ChunkLoop step_chunks, lamb_moments, lamb_params;
}
#endif

}  // namespace lrs
