// The CUDA backend. Every function enqueues work on `stream` (a cudaStream_t) and returns at once;
// errors of the runtime are thrown as std::runtime_error.
#pragma once

#include "schedules.h"
#include "tensor_table.h"

namespace lrs {

// As step_cpu, in one launch for up to 7,600 tensors, or 3,800 if their gradients are more than
// 64 GiB apart or not aligned to 16 bytes. What the table points to is in device memory;
// `gradients` and `chunk_offsets` are in host memory.
void step_cuda(const StepTable& table, const int64_t* chunk_offsets, const void* const* gradients,
               int device, void* stream);

// Writes the 2-norm of all gradients as they are stored to `norm`, in as many launches. `sums` has
// room for one number per chunk.
void grad_norm_cuda(const StepTable& table, const int64_t* chunk_offsets,
                    const void* const* gradients, double* sums, float* norm, int device,
                    void* stream);

// Writes the first `count` values of a schedule to device memory. Its sample points are there too.
void fill_schedule_cuda(const ScheduleSpec& schedule, int64_t count, float* values, int device,
                        void* stream);

// Writes one row of a group table in device memory, without waiting for a copy from the host.
void write_group_cuda(Group* target, const Group& group, int device, void* stream);

// What the data sheet of a device says of its memory: bytes a second, or 0 if it cannot be asked.
double memory_bandwidth(int device);

// Empty if a device can be used, otherwise why not.
const char* cuda_unavailable_reason();

int cuda_runtime_version();

}  // namespace lrs
