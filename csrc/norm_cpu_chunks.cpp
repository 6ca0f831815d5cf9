// The sums of squares of the CPU backend, compiled once for each instruction set (LRS_ISA).
#include <algorithm>

#include "array_parts.h"
#include "float16_pieces.h"
#include "step_cpu.h"

namespace lrs {
namespace LRS_ISA {
namespace {

// Independent partial sums, which the compiler keeps in vector registers. Their number, and with it
// the order of additions, is the same for every instruction set.
constexpr int kLanes = 16;

// Of a range of a tensor of `numel` elements.
template <typename Grad>
double sum_of_squares(const void* gradient, int64_t numel, Range range) {
  const Grad* grad = static_cast<const Grad*>(gradient);
  double sums[kLanes] = {};
  visit_parts(range, [&](int64_t begin, auto count) {
    prefetch_ahead(grad + begin, numel - begin);
    const int32_t whole = count / kLanes * kLanes;
    for (int32_t i = 0; i < whole; i += kLanes) {
      for (int lane = 0; lane < kLanes; ++lane) {
        const double value = load(grad[begin + i + lane]);
        sums[lane] += value * value;
      }
    }
    for (int32_t i = whole; i < count; ++i) {
      const double value = load(grad[begin + i]);
      sums[i - whole] += value * value;
    }
  });
  for (int width = kLanes / 2; width > 0; width /= 2) {
    for (int lane = 0; lane < width; ++lane) sums[lane] += sums[lane + width];
  }
  return sums[0];
}

double sum_of_float16_squares(const void* gradient, int64_t numel, Range range) {
  const auto* grad = static_cast<const Float16*>(gradient);
  double sum = 0.0;
  for (int64_t begin = range.begin; begin < range.end; begin += kPart) {
    const int64_t count = std::min<int64_t>(kPart, range.end - begin);
    prefetch_ahead(grad + begin, numel - begin);
    float part[kPart];
    widen(grad + begin, count, part);
    sum += sum_of_squares<float>(part, count, {0, count});
  }
  return sum;
}

double sum_of_squares(DType dtype, const void* gradient, int64_t numel, Range range) {
  switch (dtype) {
    case DType::kFloat32:
      return sum_of_squares<float>(gradient, numel, range);
    case DType::kBFloat16:
      return sum_of_squares<BFloat16>(gradient, numel, range);
    case DType::kFloat16:
      return sum_of_float16_squares(gradient, numel, range);
  }
  return 0.0;
}

}  // namespace

void square_chunks(const StepTable& table, const void* const* gradients, int64_t first,
                   int64_t last, double* sums) {
  for (int64_t i = first; i < last; ++i) {
    const Chunk chunk = table.chunks[i];
    const void* gradient = gradients[chunk.tensor];
    sums[i] = 0.0;
    if (gradient == nullptr) continue;
    const TensorEntry& entry = table.tensors[chunk.tensor];
    const Range range = chunk_range(entry.numel, table.chunk_elements, chunk.index);
    sums[i] = sum_of_squares(entry.dtype, gradient, entry.numel, range);
  }
}

}  // namespace LRS_ISA
}  // namespace lrs
