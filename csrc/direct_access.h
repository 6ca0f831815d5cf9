// What torch's libraries offer for gradients and version counters without Python objects, which a
// backward pass does not make and which take more time than all else.
//
// All but three are functions of its stable C interface (torch/csrc/inductor/aoti_torch/c/shim.h).
// They rely on one property of torch, which `TensorAccess::use_direct` makes sure of: a tensor
// (`at::Tensor`), to which a handle points, is nothing but a pointer to its implementation.
#pragma once

#include <cstdint>

#include "dlpack_exchange.h"

namespace lrs {

using Implementation = const void*;           // of a tensor
using TensorPointer = const Implementation*;  // to a tensor

// What a tensor is, apart from its shape: in numbers of torch.
struct TensorKind {
  int32_t layout, dtype, device_type, device_index;
};

struct DirectAccess {
  using Read = int32_t (*)(TensorPointer, int32_t*);

  // The gradient of a tensor, `undefined` if it has none: c10::TensorImpl::grad.
  TensorPointer (*grad)(Implementation);
  // Whether the elements in memory are those of the tensor negated: at::native::is_neg.
  bool (*is_negated)(TensorPointer);
  // Throws where there is no counter: torch::autograd::impl::bump_version.
  void (*bump_version)(TensorPointer);
  // Makes the second tensor the same as the first, which it then owns too.
  int32_t (*assign)(TensorPointer, Implementation*);
  Read layout, dtype, device_type, device_index;
  int32_t (*dim)(TensorPointer, int64_t*);
  int32_t (*sizes)(TensorPointer, int64_t**);
  int32_t (*strides)(TensorPointer, int64_t**);
  int32_t (*data_pointer)(TensorPointer, void**);

  Implementation undefined;  // that of a tensor that is none

  TensorKind kind(TensorPointer tensor) const {
    TensorKind kind{-1, -1, -1, -1};
    layout(tensor, &kind.layout);
    dtype(tensor, &kind.dtype);
    device_type(tensor, &kind.device_type);
    device_index(tensor, &kind.device_index);
    return kind;
  }

  // Reads where a tensor is and how it is laid out; false if it is of another kind, or negated.
  bool read(TensorPointer tensor, const TensorKind& expected, dlpack::Tensor* out) const {
    if (is_negated(tensor)) return false;
    int32_t value;
    // The layout comes first: where it is another, there is nothing else to read.
    if (layout(tensor, &value) != 0 || value != expected.layout) return false;
    if (dtype(tensor, &value) != 0 || value != expected.dtype) return false;
    if (device_type(tensor, &value) != 0 || value != expected.device_type) return false;
    if (device_index(tensor, &value) != 0 || value != expected.device_index) return false;
    int64_t ndim;
    if (dim(tensor, &ndim) != 0 || sizes(tensor, &out->shape) != 0) return false;
    if (strides(tensor, &out->strides) != 0 || data_pointer(tensor, &out->data) != 0) return false;
    out->ndim = static_cast<int32_t>(ndim);
    out->byte_offset = 0;
    return true;
  }
};

}  // namespace lrs
