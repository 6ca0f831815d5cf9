#include "tensor_access.h"

#include <exception>

namespace lrs {
namespace {

template <typename Function>
void look_up(const py::dict& functions, const char* name, Function* function) {
  *function = reinterpret_cast<Function>(functions[name].cast<uintptr_t>());
}

// Whether the functions do what their names promise.
bool is_verified(const TensorAccess& access, const DirectAccess& direct, const py::object& probe) {
  const py::object gradient = probe.attr("grad");
  py::list probes;
  probes.append(probe);
  probes.append(gradient.attr("_neg_view")());
  const py::list capsules = access.make_handles(probes);
  const TensorHandle handle(access, capsules[0]), negated(access, capsules[1]);
  const TensorPointer found = direct.grad(*handle.pointer());
  dlpack::Tensor expected, read;
  if (access.exchange->tensor_from_py_object(gradient.ptr(), &expected) != 0) {
    throw py::error_already_set();
  }
  if (!direct.read(found, direct.kind(handle.pointer()), &read) || read.data != expected.data ||
      read.ndim != expected.ndim) {
    return false;
  }
  for (int32_t i = 0; i < read.ndim; ++i) {
    if (read.shape[i] != expected.shape[i] || read.strides[i] != expected.strides[i]) return false;
  }
  if (direct.is_negated(found) || !direct.is_negated(negated.pointer())) return false;
  if (*direct.grad(*found) != direct.undefined) return false;  // a gradient has none
  Implementation held = direct.undefined;
  if (direct.assign(found, &held) != 0 || held != *found) return false;
  if (direct.assign(&direct.undefined, &held) != 0 || held != direct.undefined) return false;
  const auto version = [&] { return probe.attr("_version").cast<int64_t>(); };
  const int64_t before = version();
  direct.bump_version(handle.pointer());
  return version() == before + 1;
}

}  // namespace

bool TensorAccess::use_direct(const py::dict& functions, const py::object& probe) {
  DirectAccess found{};
  look_up(functions, "grad", &found.grad);
  look_up(functions, "is_negated", &found.is_negated);
  look_up(functions, "bump_version", &found.bump_version);
  look_up(functions, "assign", &found.assign);
  int32_t (*make_undefined)(void** handle);
  look_up(functions, "make_undefined", &make_undefined);
  look_up(functions, "layout", &found.layout);
  look_up(functions, "dtype", &found.dtype);
  look_up(functions, "device_type", &found.device_type);
  look_up(functions, "device_index", &found.device_index);
  look_up(functions, "dim", &found.dim);
  look_up(functions, "sizes", &found.sizes);
  look_up(functions, "strides", &found.strides);
  found.data_pointer = data_pointer;
  void* handle = nullptr;
  if (make_undefined(&handle) != 0) return false;
  found.undefined = *static_cast<TensorPointer>(handle);
  delete_handle(handle);
  try {
    if (!is_verified(*this, found, probe)) return false;
  } catch (const std::exception&) {
    return false;
  }
  direct = found;
  return true;
}

}  // namespace lrs
