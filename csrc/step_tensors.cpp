#include "step_tensors.h"

#include <algorithm>
#include <exception>
#include <stdexcept>
#include <utility>

namespace lrs {
namespace {

// Stands for the address of an empty gradient: null means that there is none.
const void* const kEmptyGradient = reinterpret_cast<const void*>(16);

// Keys of a parameter's state.
constexpr const char* kScaleSuffix = "_scale";
constexpr const char* kRemainder = "master_remainder";

dlpack::Tensor read(const TensorAccess& access, const py::handle& object) {
  dlpack::Tensor tensor;
  if (access.exchange->tensor_from_py_object(object.ptr(), &tensor) != 0) {
    throw py::error_already_set();
  }
  tensor.data = static_cast<char*>(tensor.data) + tensor.byte_offset;
  return tensor;
}

bool same(const dlpack::DataType& a, const dlpack::DataType& b) {
  return a.code == b.code && a.bits == b.bits && a.lanes == b.lanes;
}

bool same(const dlpack::Device& a, const dlpack::Device& b) {
  return a.type == b.type && a.index == b.index;
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

// The address of an array that goes with a parameter: `count` elements on its device.
void* array(const dlpack::Tensor& tensor, uint8_t code, uint8_t bits, const dlpack::Device& device,
            int64_t count) {
  if (tensor.dtype.code != code || tensor.dtype.bits != bits || !same(tensor.device, device) ||
      numel(tensor) != count) {
    throw std::invalid_argument("a state has not the dtype, device or size that the update needs");
  }
  return tensor.data;
}

float* floats(const dlpack::Tensor& tensor, const dlpack::Device& device, int64_t count) {
  return static_cast<float*>(array(tensor, dlpack::kFloat, 32, device, count));
}

void* states(StateType type, const dlpack::Tensor& tensor, const dlpack::Device& device,
             int64_t count) {
  switch (type) {
    case StateType::kBFloat16:
      return array(tensor, dlpack::kBFloat, 16, device, count);
    case StateType::kBlock8:
      return array(tensor, dlpack::kUInt, 8, device, count);
    case StateType::kFloat32:
      break;
  }
  return floats(tensor, device, count);
}

// Throws if memory belongs to two parameters, which one launch would update at the same time.
void check_apart(const std::vector<TensorEntry>& entries) {
  std::vector<std::pair<const char*, const char*>> ranges;
  for (const TensorEntry& entry : entries) {
    if (entry.numel == 0) continue;
    const char* begin = static_cast<const char*>(entry.param);
    ranges.emplace_back(begin, begin + entry.numel * (entry.dtype == DType::kFloat32 ? 4 : 2));
  }
  std::sort(ranges.begin(), ranges.end());
  for (size_t i = 1; i < ranges.size(); ++i) {
    if (ranges[i].first < ranges[i - 1].second) {
      throw std::invalid_argument(
          "two parameters share memory, which one step would update twice at once: tie them by "
          "making both the same Parameter, as in `decoder.weight = encoder.weight`");
    }
  }
}

void prefetch_ends(Implementation implementation) {
  __builtin_prefetch(implementation);
  __builtin_prefetch(static_cast<const char*>(implementation) + 160);
}

// The C function behind the attribute `grad` of a tensor, which saves its look-up at every step.
PyGetSetDef* plain_getter(const py::handle& tensor) {
  const py::object attribute = py::type::of(tensor).attr("grad");
  if (!Py_IS_TYPE(attribute.ptr(), &PyGetSetDescr_Type)) return nullptr;
  return reinterpret_cast<PyGetSetDescrObject*>(attribute.ptr())->d_getset;
}

}  // namespace

StepTensors::StepTensors(const TensorAccess& access, const py::list& param_lists,
                         const py::dict& state, const py::list& state_names, const py::list& steps,
                         StateType state_type, const std::vector<int64_t>& positions)
    : access_(access), state_(state) {
  py::list held;
  std::vector<const void*> held_addresses;
  const auto hold = [&](const py::handle& object) {
    const dlpack::Tensor tensor = read(access_, object);
    if (tensor.data == nullptr && numel(tensor) > 0) {
      throw std::invalid_argument("a parameter or state has no memory");
    }
    held.append(object);
    held_addresses.push_back(tensor.data);
    return tensor;
  };
  size_t position = 0;
  for (size_t group = 0; group < param_lists.size(); ++group) {
    for (const py::handle& param : py::reinterpret_borrow<py::iterable>(param_lists[group])) {
      const int64_t in_optimizer =
          positions.empty() ? static_cast<int64_t>(position) : positions.at(position);
      const py::object step = steps[position++];
      const bool takes_part = !step.is_none();
      const size_t addresses_begin = held_addresses.size();
      const dlpack::Tensor tensor = takes_part ? hold(param) : read(access_, param);
      Param& added = params_.emplace_back();
      added.tensor = py::reinterpret_borrow<py::object>(param);
      added.addresses_begin = added.addresses_end = static_cast<uint32_t>(addresses_begin);
      added.layout = static_cast<uint32_t>(layouts_.size());
      added.ndim = tensor.ndim;
      added.entry = -1;
      added.dtype = tensor.dtype;
      added.getter = plain_getter(param);
      layouts_.insert(layouts_.end(), tensor.shape, tensor.shape + tensor.ndim);
      layouts_.insert(layouts_.end(), tensor.strides, tensor.strides + tensor.ndim);
      device_ = tensor.device;
      if (!takes_part) continue;
      TensorEntry entry{};
      entry.param = tensor.data;
      entry.numel = numel(tensor);
      entry.group = static_cast<int64_t>(group);
      entry.position = in_optimizer;
      entry.dtype = dtype_of(tensor);
      if (entry.dtype == DType::kFloat16 && state_type != StateType::kFloat32) {
        throw std::invalid_argument("float16 parameters need float32 states");
      }
      const py::list names = state_names[group];
      if (state.contains(param)) {
        const py::dict param_state = state[param];
        int index = 0;
        for (const py::handle& name : names) {
          if (index == kMaxStates ||
              (index == kMaxCompressedStates && state_type != StateType::kFloat32)) {
            throw std::invalid_argument("more states than the storage has room for");
          }
          entry.states[index] =
              states(state_type, hold(param_state[name]), tensor.device, entry.numel);
          if (state_type == StateType::kBlock8) {
            const py::object scale = param_state[py::str(name) + py::str(kScaleSuffix)];
            entry.scales[index] =
                floats(hold(scale), tensor.device, num_chunks_of(entry.numel, kQuantBlock));
          }
          ++index;
        }
        if (param_state.contains(kRemainder)) {
          entry.remainder = static_cast<int16_t*>(
              array(hold(param_state[kRemainder]), dlpack::kInt, 16, tensor.device, entry.numel));
        }
      } else if (!names.empty()) {
        throw std::runtime_error(kChanged);
      }
      entry.step = floats(hold(step), tensor.device, 1);
      params_.back().addresses_end = static_cast<uint32_t>(held_addresses.size());
      params_.back().entry = static_cast<int32_t>(entries_.size());
      entries_.push_back(entry);
    }
  }
  check_apart(entries_);
  state_versions_.add(state.ptr());
  for (const auto& item : state) {
    const size_t first = state_values_.size();
    if (PyDict_Check(item.second.ptr())) {
      state_versions_.add(item.second.ptr());
      for (const auto& array : py::reinterpret_borrow<py::dict>(item.second)) {
        state_values_.push_back(py::reinterpret_borrow<py::object>(array.second));
      }
    }
    param_states_.push_back({py::reinterpret_borrow<py::object>(item.second),
                             static_cast<Py_ssize_t>(state_values_.size() - first)});
  }
  for (const py::handle& capsule : py::list(access_.make_handles(held))) {
    handles_.emplace_back(access_, capsule);
    addresses_.push_back({*handles_.back().pointer(), held_addresses[addresses_.size()]});
  }
  gradients_.resize(entries_.size());
  if (!access_.direct) return;
  directly_held_.resize(entries_.size(), access_.direct->undefined);
  for (Param& param : params_) {
    if (param.entry < 0 || param.getter == nullptr || !access_.is_plain(param.tensor)) continue;
    param.direct = addresses_[param.addresses_begin].implementation;
    param.kind = access_.direct->kind(tensor_at(param.addresses_begin));
  }
}

bool StepTensors::same_params(const py::list& param_lists) const {
  size_t position = 0;
  for (const py::handle& group : param_lists) {
    // A list or a tuple as it is, whatever else can be iterated over as a list.
    const auto params = py::reinterpret_steal<py::object>(PySequence_Fast(group.ptr(), "params"));
    if (!params) throw py::error_already_set();
    const Py_ssize_t size = PySequence_Fast_GET_SIZE(params.ptr());
    for (Py_ssize_t i = 0; i < size; ++i, ++position) {
      if (position == params_.size()) return false;
      if (PySequence_Fast_GET_ITEM(params.ptr(), i) != params_[position].tensor.ptr()) return false;
    }
  }
  return position == params_.size();
}

bool StepTensors::same_states(const py::dict& state) {
  if (!state.is(state_)) return false;
  if (state_versions_.are_unchanged()) return true;
  if (!same_entries()) return false;
  state_versions_.renew();  // something has been put there and taken away again
  return true;
}

bool StepTensors::same_entries() const {
  if (state_.size() != param_states_.size()) return false;
  PyObject *key, *value;
  Py_ssize_t position = 0;
  auto array = state_values_.begin();
  for (const ParamState& held : param_states_) {
    if (!PyDict_Next(state_.ptr(), &position, &key, &value) || value != held.entry.ptr()) {
      return false;
    }
    if (!PyDict_Check(value)) continue;
    if (PyDict_GET_SIZE(value) != held.num_values) return false;
    Py_ssize_t array_position = 0;
    for (const auto end = array + held.num_values; array != end; ++array) {
      PyDict_Next(held.entry.ptr(), &array_position, &key, &value);
      if (value != array->ptr()) return false;
    }
  }
  return true;
}

// Whether a tensor of the parameter's shape with these strides visits memory as the parameter did.
// The stride of a dimension of size 1 is free.
bool StepTensors::has_strides(const Param& param, const int64_t* found) const {
  const int64_t* shape = layouts_.data() + param.layout;
  const int64_t* strides = shape + param.ndim;
  for (int32_t i = 0; i < param.ndim; ++i) {
    if (shape[i] != 1 && found[i] != strides[i]) return false;
  }
  return true;
}

// Whether `tensor` has the parameter's shape, and visits memory as the parameter did.
bool StepTensors::same_layout(const Param& param, const dlpack::Tensor& tensor) const {
  if (tensor.ndim != param.ndim) return false;
  const int64_t* shape = layouts_.data() + param.layout;
  for (int32_t i = 0; i < param.ndim; ++i) {
    if (tensor.shape[i] != shape[i]) return false;
  }
  return has_strides(param, tensor.strides);
}

py::object StepTensors::gradient_of(const Param& param) {
  PyObject* tensor = param.tensor.ptr();
  PyObject* gradient = param.getter != nullptr ? param.getter->get(tensor, param.getter->closure)
                                               : PyObject_GetAttrString(tensor, "grad");
  if (gradient == nullptr) throw py::error_already_set();
  return py::reinterpret_steal<py::object>(gradient);
}

// A copy of the pointer that a tensor is does for one, and is where the address is.
TensorPointer StepTensors::tensor_at(size_t address) const {
  return access_.direct ? &addresses_[address].implementation : handles_[address].pointer();
}

bool StepTensors::same_addresses(const Param& param) const {
  for (size_t i = param.addresses_begin; i < param.addresses_end; ++i) {
    if (!access_.is_at(tensor_at(i), addresses_[i].address)) return false;
  }
  return true;
}

// Whether a parameter in the table visits its memory as it did: `t_()` leaves the address, and the
// gradient, as they are. One dimension has no order to lose.
bool StepTensors::is_in_order(const Param& param) const {
  if (param.ndim < 2 || param.entry < 0) return true;
  dlpack::Tensor now;
  if (access_.direct) {
    const TensorPointer tensor = tensor_at(param.addresses_begin);
    int64_t ndim;
    if (access_.direct->dim(tensor, &ndim) != 0 || ndim != param.ndim) return false;
    if (access_.direct->strides(tensor, &now.strides) != 0) return false;
  } else if (access_.exchange->tensor_from_py_object(param.tensor.ptr(), &now) != 0) {
    throw py::error_already_set();
  } else if (now.ndim != param.ndim) {
    return false;
  }
  return has_strides(param, now.strides);
}

// Between two steps everything has left the cache, and the checks are mostly waiting for memory:
// it is asked for what they will need some parameters later. Where that is, as far as we know, is
// good enough for it: a prefetch of the wrong place is only useless.
void StepTensors::prefetch(size_t position, bool reads_directly) const {
  constexpr size_t kFar = 8, kNear = 4;
  constexpr size_t kStorage = 2;  // of the pointers in an implementation
  if (position + kFar < params_.size()) {
    const Param& later = params_[position + kFar];
    if (!reads_directly) __builtin_prefetch(later.tensor.ptr());
    for (size_t i = later.addresses_begin; i < later.addresses_end; ++i) {
      prefetch_ends(addresses_[i].implementation);
    }
  }
  if (position + kNear < params_.size()) {
    const Param& soon = params_[position + kNear];
    for (size_t i = soon.addresses_begin; i < soon.addresses_end; ++i) {
      if (access_.direct) {
        __builtin_prefetch(static_cast<void* const*>(addresses_[i].implementation)[kStorage]);
      }
      if (device_.type == dlpack::kCPU) __builtin_prefetch(addresses_[i].address, 1);  // to compute
    }
    if (reads_directly && soon.direct != nullptr) {
      const Implementation gradient = *access_.direct->grad(soon.direct);
      prefetch_ends(gradient);
      __builtin_prefetch(static_cast<const char*>(gradient) + 64);
    }
  }
}

void StepTensors::note(const Param& param, const void* address) {
  const void*& noted = gradients_[static_cast<size_t>(param.entry)];
  has_gradients_ |= address != nullptr;
  has_changed_gradients_ |= (address == nullptr) != (noted == nullptr);
  noted = address;
}

// Takes a gradient of the parameter's dtype and device; false if it is laid out otherwise.
bool StepTensors::take(const Param& param, const dlpack::Tensor& gradient) {
  if (!same_layout(param, gradient)) return false;
  if (gradient.data != nullptr) {
    note(param, static_cast<char*>(gradient.data) + gradient.byte_offset);
    return true;
  }
  if (numel(gradient) > 0) return false;
  note(param, kEmptyGradient);
  return true;
}

bool StepTensors::collect(const Param& param, py::object gradient) {
  if (param.entry < 0) return gradient.is_none();
  if (gradient.is_none()) {
    note(param, nullptr);
    return true;
  }
  dlpack::Tensor grad;
  if (access_.exchange->tensor_from_py_object(gradient.ptr(), &grad) != 0) {
    PyErr_Clear();  // it has no plain memory: the caller looks closer and explains
    return false;
  }
  if (access_.is_negated(gradient).cast<bool>()) return false;
  if (!same(grad.dtype, param.dtype) || !same(grad.device, device_) || !take(param, grad)) {
    return false;
  }
  held_gradients_.push_back(std::move(gradient));
  return true;
}

bool StepTensors::collect_directly(const Param& param) {
  const DirectAccess& direct = *access_.direct;
  const TensorPointer gradient = direct.grad(param.direct);
  // Of a tensor that is no leaf and so has no gradient, the attribute warns.
  if (*gradient == direct.undefined) return collect(param, gradient_of(param));
  dlpack::Tensor grad;
  if (!direct.read(gradient, param.kind, &grad) || !take(param, grad)) return false;
  return direct.assign(gradient, &directly_held_[static_cast<size_t>(param.entry)]) == 0;
}

bool StepTensors::collect_all(const py::object& gradients) {
  const bool reads_directly =
      access_.direct && gradients.is_none() && !access_.has_function_mode().cast<bool>();
  for (size_t i = 0; i < params_.size(); ++i) {
    const Param& param = params_[i];
    prefetch(i, reads_directly);
    if (!same_addresses(param) || !is_in_order(param)) return false;
    if (reads_directly && param.direct != nullptr) {
      if (!collect_directly(param)) return false;
    } else if (!collect(param, gradients.is_none()
                                   ? gradient_of(param)
                                   : py::reinterpret_borrow<py::list>(gradients)[i])) {
      return false;
    }
  }
  return true;
}

bool StepTensors::refresh(const py::list& param_lists, const py::dict& state,
                          const py::object& gradients) {
  release_gradients();
  has_gradients_ = false;
  return same_params(param_lists) && same_states(state) && collect_all(gradients);
}

void StepTensors::release_gradients() {
  held_gradients_.clear();
  for (Implementation& held : directly_held_) {
    const DirectAccess& direct = *access_.direct;
    if (held != direct.undefined) direct.assign(&direct.undefined, &held);
  }
}

bool StepTensors::count_update() {
  if (!access_.direct) return false;
  for (const Param& param : params_) {
    if (param.entry < 0 || gradients_[static_cast<size_t>(param.entry)] == nullptr) continue;
    try {
      access_.direct->bump_version(tensor_at(param.addresses_begin));
    } catch (const std::exception&) {
      // A tensor made under inference_mode has no counter, and autograd no use for one.
    }
  }
  return true;
}

py::list StepTensors::updated_params() {
  if (has_changed_gradients_) {
    has_changed_gradients_ = false;
    updated_params_ = py::list();
    for (const Param& param : params_) {
      if (param.entry >= 0 && gradients_[static_cast<size_t>(param.entry)] != nullptr) {
        updated_params_.append(param.tensor);
      }
    }
  }
  return updated_params_;
}

void* StepTensors::current_stream() const {
  void* stream = nullptr;
  if (access_.exchange->current_work_stream(device_.type, device_.index, &stream) != 0) {
    throw py::error_already_set();
  }
  return stream;
}

}  // namespace lrs
