// Marks for code that the host compilers and nvcc both compile.
#pragma once

#include <cstdint>

#if defined(__CUDACC__)
#define LRS_HOST_DEVICE __host__ __device__ __forceinline__
#elif defined(__GNUC__)
#define LRS_HOST_DEVICE inline __attribute__((always_inline))
#else
#define LRS_HOST_DEVICE inline
#endif

// One source file is compiled once per instruction set. Everything with LRS_HOST_DEVICE lives in a
// namespace named after the set, so that the linker never replaces one build by another.
#ifndef LRS_ISA
#define LRS_ISA baseline
#endif
