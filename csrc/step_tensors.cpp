#include "step_tensors.h"

#include <stdexcept>

namespace lrs {
namespace {

// Stands for the address of an empty gradient: null means that there is none.
const void* const kEmptyGradient = reinterpret_cast<const void*>(16);

const dlpack::ExchangeApi* exchange_api_of(const py::capsule& capsule) {
  auto* api =
      static_cast<dlpack::ExchangeApi*>(PyCapsule_GetPointer(capsule.ptr(), dlpack::kCapsuleName));
  if (api == nullptr) throw py::error_already_set();
  while (api != nullptr && api->major_version != dlpack::kMajorVersion) api = api->previous;
  if (api == nullptr) {
    throw std::runtime_error(
        "this torch offers no DLPack exchange interface of version 1; "
        "install torch 2.10 or later");
  }
  return api;
}

// False with no Python exception pending if the object has no plain memory (a sparse tensor).
bool read(const dlpack::ExchangeApi* api, PyObject* object, dlpack::Tensor* out) {
  if (api->tensor_from_py_object(object, out) == 0) {
    out->data = static_cast<char*>(out->data) + out->byte_offset;
    return true;
  }
  PyErr_Clear();
  return false;
}

dlpack::Tensor read_or_throw(const dlpack::ExchangeApi* api, const py::handle& object) {
  dlpack::Tensor tensor;
  if (api->tensor_from_py_object(object.ptr(), &tensor) != 0) throw py::error_already_set();
  tensor.data = static_cast<char*>(tensor.data) + tensor.byte_offset;
  return tensor;
}

bool same(const dlpack::DataType& a, const dlpack::DataType& b) {
  return a.code == b.code && a.bits == b.bits && a.lanes == b.lanes;
}

bool same(const dlpack::Device& a, const dlpack::Device& b) {
  return a.type == b.type && a.index == b.index;
}

// Whether both visit memory in the same order. The stride of a dimension of size 1 means nothing.
bool same_layout(const dlpack::Tensor& a, const dlpack::Tensor& b) {
  if (a.ndim != b.ndim) return false;
  for (int32_t i = 0; i < a.ndim; ++i) {
    if (a.shape[i] != b.shape[i]) return false;
    if (a.shape[i] != 1 && a.strides[i] != b.strides[i]) return false;
  }
  return true;
}

int64_t numel(const dlpack::Tensor& tensor) {
  int64_t count = 1;
  for (int32_t i = 0; i < tensor.ndim; ++i) count *= tensor.shape[i];
  return count;
}

DType dtype_of(const dlpack::Tensor& tensor) {
  const bool is_float = tensor.dtype.code == dlpack::kFloat;
  if (is_float && tensor.dtype.bits == 32) return DType::kFloat32;
  if (is_float && tensor.dtype.bits == 16) return DType::kFloat16;
  if (tensor.dtype.code == dlpack::kBFloat && tensor.dtype.bits == 16) return DType::kBFloat16;
  throw std::invalid_argument("parameters must be float32, bfloat16 or float16");
}

}  // namespace

StepTensors::StepTensors(const py::capsule& exchange_api, const py::list& param_lists,
                         const py::dict& state, const py::list& state_names, const py::list& steps)
    : api_(exchange_api_of(exchange_api)), state_(state) {
  const auto watch = [&](const py::handle& dict, const py::handle& key, const py::handle& tensor) {
    void* address = read_or_throw(api_, tensor).data;
    watched_.push_back({py::reinterpret_borrow<py::object>(dict),
                        py::reinterpret_borrow<py::object>(key),
                        py::reinterpret_borrow<py::object>(tensor), address});
    return static_cast<float*>(address);
  };
  const py::str step_name("step");
  size_t position = 0;
  for (size_t group = 0; group < param_lists.size(); ++group) {
    for (const py::handle& param : py::reinterpret_borrow<py::list>(param_lists[group])) {
      const py::object step = steps[position++];
      const dlpack::Tensor tensor = read_or_throw(api_, param);
      const bool takes_part = !step.is_none();
      params_.push_back({py::reinterpret_borrow<py::object>(param), tensor.data, tensor.dtype,
                         takes_part ? static_cast<int64_t>(entries_.size()) : -1});
      device_ = tensor.device;
      if (!takes_part) continue;
      TensorEntry entry{};
      entry.param = tensor.data;
      entry.numel = numel(tensor);
      entry.group = static_cast<int64_t>(group);
      entry.dtype = dtype_of(tensor);
      entry.step = static_cast<float*>(read_or_throw(api_, step).data);
      if (state.contains(param)) {
        const py::dict param_state = state[param];
        size_t index = 0;
        for (const py::handle& name : py::reinterpret_borrow<py::list>(state_names[group])) {
          if (param_state.contains(name)) {
            entry.states[index] = watch(param_state, name, param_state[name]);
          }
          ++index;
        }
        if (param_state.contains(step_name)) watch(param_state, step_name, step);
      }
      entries_.push_back(entry);
    }
  }
  for (const auto& item : state) {
    state_dicts_.push_back(py::reinterpret_borrow<py::object>(item.second));
  }
  gradients_.resize(entries_.size());
}

bool StepTensors::same_params(const py::list& param_lists) const {
  size_t position = 0;
  for (const py::handle& params : param_lists) {
    const Py_ssize_t size = PyList_GET_SIZE(params.ptr());
    for (Py_ssize_t i = 0; i < size; ++i, ++position) {
      if (position == params_.size()) return false;
      if (PyList_GET_ITEM(params.ptr(), i) != params_[position].tensor.ptr()) return false;
    }
  }
  return position == params_.size();
}

bool StepTensors::same_states(const py::dict& state) const {
  if (!state.is(state_) || state.size() != state_dicts_.size()) return false;
  PyObject *key, *value;
  Py_ssize_t iterator = 0;
  for (const py::object& held : state_dicts_) {
    if (!PyDict_Next(state.ptr(), &iterator, &key, &value) || value != held.ptr()) return false;
  }
  for (const Watched& watched : watched_) {
    if (PyDict_GetItemWithError(watched.dict.ptr(), watched.key.ptr()) != watched.tensor.ptr()) {
      return false;
    }
    dlpack::Tensor now;
    if (!read(api_, watched.tensor.ptr(), &now) || now.data != watched.address) return false;
  }
  return true;
}

bool StepTensors::collect(const Param& param, PyObject* gradient) {
  if (gradient == Py_None) {
    if (param.entry >= 0) gradients_[static_cast<size_t>(param.entry)] = nullptr;
    return true;
  }
  if (param.entry < 0) return false;
  dlpack::Tensor now, grad;
  if (!read(api_, param.tensor.ptr(), &now) || !read(api_, gradient, &grad)) return false;
  const TensorEntry& entry = entries_[static_cast<size_t>(param.entry)];
  const bool same_param = now.data == param.address && numel(now) == entry.numel &&
                          same(now.dtype, param.dtype) && same(now.device, device_);
  if (!same_param || !same(grad.dtype, param.dtype) || !same(grad.device, device_) ||
      !same_layout(now, grad)) {
    return false;
  }
  gradients_[static_cast<size_t>(param.entry)] = grad.data != nullptr ? grad.data : kEmptyGradient;
  has_gradients_ = true;
  return true;
}

bool StepTensors::refresh(const py::list& param_lists, const py::dict& state,
                          const py::object& gradients) {
  static PyObject* const grad_name = PyUnicode_InternFromString("grad");
  if (!same_params(param_lists) || !same_states(state)) return false;
  has_gradients_ = false;
  for (size_t i = 0; i < params_.size(); ++i) {
    if (gradients.is_none()) {
      const auto gradient =
          py::reinterpret_steal<py::object>(PyObject_GetAttr(params_[i].tensor.ptr(), grad_name));
      if (!gradient) throw py::error_already_set();
      if (!collect(params_[i], gradient.ptr())) return false;
    } else if (!collect(params_[i], PyList_GetItem(gradients.ptr(), static_cast<Py_ssize_t>(i)))) {
      return false;
    }
  }
  return true;
}

void* StepTensors::current_stream() const {
  void* stream = nullptr;
  if (api_->current_work_stream(device_.type, device_.index, &stream) != 0) {
    throw py::error_already_set();
  }
  return stream;
}

}  // namespace lrs
