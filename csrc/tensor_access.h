// What a Python framework offers for reading its tensors from C, without linking it.
//
// A Python object is read through DLPack's exchange interface: all there is to know, in about 35
// ns. A tensor that is looked at again and again gets a handle, which tells its address in about 5
// ns. Gradients are others after each backward pass, which makes no Python objects: `DirectAccess`
// reads them without, where torch has what it takes.
#pragma once

#include <pybind11/pybind11.h>

#include <optional>
#include <utility>

#include "direct_access.h"
#include "dlpack_exchange.h"

namespace lrs {

namespace py = pybind11;

struct TensorAccess {
  const dlpack::ExchangeApi* exchange;
  py::function make_handles;  // from a list of tensors to a list of capsules, which the taker owns
  int32_t (*data_pointer)(TensorPointer handle, void** out);  // 0 on success
  int32_t (*delete_handle)(void* handle);
  py::function is_negated;  // whether the elements in memory are those of the tensor negated
  std::optional<DirectAccess> direct;  // where the framework has it
  py::tuple plain_types;               // of tensors whose gradient may be read directly
  py::function has_function_mode;      // whether somebody wants to see each access of a gradient

  // Sets `direct` if the functions, addresses by the names of its members and of `make_undefined`,
  // do with `probe`, a float32 tensor with a gradient, what they should; returns whether they do.
  bool use_direct(const py::dict& functions, const py::object& probe);

  // Whether the first element of a tensor is at `address`.
  bool is_at(TensorPointer tensor, const void* address) const {
    void* now = nullptr;
    return data_pointer(tensor, &now) == 0 && now == address;
  }

  // Whether reading the gradient in C++ is the same as reading the attribute in Python.
  bool is_plain(const py::handle& tensor) const {
    for (const py::handle type : plain_types) {
      if (Py_IS_TYPE(tensor.ptr(), reinterpret_cast<PyTypeObject*>(type.ptr()))) return true;
    }
    return false;
  }
};

// An owned handle: it keeps the tensor alive and follows it when its memory is exchanged.
class TensorHandle {
 public:
  TensorHandle(const TensorAccess& access, const py::handle& capsule)
      : access_(&access), handle_(PyCapsule_GetPointer(capsule.ptr(), nullptr)) {
    if (handle_ == nullptr) throw py::error_already_set();
  }
  TensorHandle(TensorHandle&& other) noexcept
      : access_(other.access_), handle_(std::exchange(other.handle_, nullptr)) {}
  TensorHandle& operator=(TensorHandle&&) = delete;
  ~TensorHandle() {
    if (handle_ != nullptr) access_->delete_handle(handle_);
  }

  TensorPointer pointer() const { return static_cast<TensorPointer>(handle_); }

 private:
  const TensorAccess* access_;
  void* handle_;
};

}  // namespace lrs
