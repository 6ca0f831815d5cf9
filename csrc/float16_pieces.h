// float16 tensors of the CPU backend, worked through as float32 a piece at a time: compilers
// vectorise the arithmetic, but not the conversions that a CPU has.
#pragma once

#include <algorithm>

#include "array_parts.h"

#if defined(__F16C__)
#include <immintrin.h>
#endif

namespace lrs {
inline namespace LRS_ISA {

inline void widen(const Float16* __restrict__ from, int64_t count, float* __restrict__ to) {
  int64_t i = 0;
#if defined(__AVX512F__)
  for (; i + 16 <= count; i += 16) {
    const __m256i bits = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from + i));
    _mm512_storeu_ps(to + i, _mm512_cvtph_ps(bits));
  }
#elif defined(__F16C__)
  for (; i + 8 <= count; i += 8) {
    const __m128i bits = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from + i));
    _mm256_storeu_ps(to + i, _mm256_cvtph_ps(bits));
  }
#endif
  for (; i < count; ++i) to[i] = load(from[i]);
}

inline void narrow(const float* __restrict__ from, int64_t count, Float16* __restrict__ to) {
  int64_t i = 0;
#if defined(__AVX512F__)
  for (; i + 16 <= count; i += 16) {
    const __m256i bits = _mm512_cvtps_ph(_mm512_loadu_ps(from + i), _MM_FROUND_TO_NEAREST_INT);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to + i), bits);
  }
#elif defined(__F16C__)
  for (; i + 8 <= count; i += 8) {
    const __m128i bits = _mm256_cvtps_ph(_mm256_loadu_ps(from + i), _MM_FROUND_TO_NEAREST_INT);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to + i), bits);
  }
#endif
  for (; i < count; ++i) store(to[i], from[i]);
}

// Calls body(entry, gradient, range) for the pieces of a range of a float16 tensor, as if it were
// float32. `gradient` may be null. Whether the body writes the parameter is a template argument.
template <bool kWritesParam, typename Body>
void visit_as_float32(const TensorEntry& entry, const void* gradient, Range range,
                      const Body& body) {
  TensorEntry piece = entry;
  piece.dtype = DType::kFloat32;
  for (int64_t begin = range.begin; begin < range.end; begin += kPart) {
    const int64_t left = entry.numel - begin;
    const int64_t count = std::min<int64_t>(kPart, range.end - begin);
    Float16* param = static_cast<Float16*>(entry.param) + begin;
    alignas(64) float param_piece[kPart], grad_piece[kPart];
    widen(param, count, param_piece);
    prefetch_ahead(param, left);
    if (gradient != nullptr) {
      const auto* grad = static_cast<const Float16*>(gradient) + begin;
      widen(grad, count, grad_piece);
      prefetch_ahead(grad, left);
    }
    piece.param = param_piece;
    piece.numel = count;
    for (int s = 0; s < kMaxStates; ++s) {
      if (entry.states[s] == nullptr) continue;
      float* state = static_cast<float*>(entry.states[s]) + begin;
      piece.states[s] = state;
      prefetch_ahead(state, left);
    }
    body(piece, grad_piece, Range{0, count});
    if constexpr (kWritesParam) narrow(param_piece, count, param);
  }
}

}  // namespace LRS_ISA
}  // namespace lrs
