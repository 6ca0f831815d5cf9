// The sums of squares of the CPU backend, compiled once for each instruction set (LRS_ISA).
#include "float16_pieces.h"
#include "step_cpu.h"

namespace lrs {
namespace LRS_ISA {
namespace {

// Independent partial sums, which the compiler keeps in vector registers. Their number, and with it
// the order of additions, is the same for every instruction set.
constexpr int kLanes = 16;

template <typename Grad>
double sum_of_squares(const void* gradient, Range range) {
  const Grad* grad = static_cast<const Grad*>(gradient);
  double sums[kLanes] = {};
  int64_t i = range.begin;
  for (; i + kLanes <= range.end; i += kLanes) {
    for (int lane = 0; lane < kLanes; ++lane) {
      const double value = load(grad[i + lane]);
      sums[lane] += value * value;
    }
  }
  for (int lane = 0; i < range.end; ++i, ++lane) {
    const double value = load(grad[i]);
    sums[lane] += value * value;
  }
  for (int width = kLanes / 2; width > 0; width /= 2) {
    for (int lane = 0; lane < width; ++lane) sums[lane] += sums[lane + width];
  }
  return sums[0];
}

double sum_of_float16_squares(const void* gradient, Range range) {
  double sum = 0.0;
  for (int64_t begin = range.begin; begin < range.end; begin += kFloat16Piece) {
    const int64_t count = std::min(kFloat16Piece, range.end - begin);
    float piece[kFloat16Piece];
    widen(static_cast<const Float16*>(gradient) + begin, count, piece);
    sum += sum_of_squares<float>(piece, {0, count});
  }
  return sum;
}

double sum_of_squares(DType dtype, const void* gradient, Range range) {
  switch (dtype) {
    case DType::kFloat32:
      return sum_of_squares<float>(gradient, range);
    case DType::kBFloat16:
      return sum_of_squares<BFloat16>(gradient, range);
    case DType::kFloat16:
      return sum_of_float16_squares(gradient, range);
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
    sums[i] = sum_of_squares(entry.dtype, gradient, range);
  }
}

}  // namespace LRS_ISA
}  // namespace lrs
