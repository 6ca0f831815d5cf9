// The live Python tensors of an optimizer, as rows of the step table.
//
// A table of addresses goes stale when a parameter or a state is replaced, moved or resized behind
// the optimizer's back. `refresh` compares every address with what the tensors say now, and
// collects the gradients' addresses on the way.
#pragma once

#include <pybind11/pybind11.h>

#include <vector>

#include "dict_versions.h"
#include "tensor_access.h"
#include "tensor_table.h"

namespace lrs {

class StepTensors {
 public:
  // What to say where another thread has changed what a table is being made of.
  static constexpr const char* kChanged =
      "a parameter or a state changed while the optimizer read it";

  // `param_lists` and `state_names` have one list per group: its parameters, and the keys under
  // which `state` keeps the arrays that the update reads, of the given type. Block-quantised ones
  // have their scales under the same key with the suffix "_scale"; the low halves of a split
  // parameter are under "master_remainder". `steps` has the step counter of each
  // parameter in order, or None for one that takes no part because it has no state yet.
  // `positions` are those of the parameters in the optimizer, 0, 1, ... if it is empty.
  // `access` outlives the object.
  StepTensors(const TensorAccess& access, const py::list& param_lists, const py::dict& state,
              const py::list& state_names, const py::list& steps, StateType state_type,
              const std::vector<int64_t>& positions);
  ~StepTensors() { release_gradients(); }
  StepTensors(StepTensors&&) = delete;

  // Collects the gradients. False if anything but the gradients' addresses has changed since the
  // table was built, or a gradient is not laid out as its parameter. `gradients`, if not None,
  // takes the place of the parameters' own.
  bool refresh(const py::list& param_lists, const py::dict& state, const py::object& gradients);

  // Lets go of the gradients, which are held so that nobody frees them before a kernel has read
  // them.
  void release_gradients();

  const std::vector<TensorEntry>& entries() const { return entries_; }
  const std::vector<const void*>& gradients() const { return gradients_; }
  bool has_gradients() const { return has_gradients_; }

  // Tells autograd that the parameters with gradients have changed; false if it has to be told
  // `updated_params`.
  bool count_update();

  // The parameters that have a gradient. The list is a new one whenever they change.
  py::list updated_params();

  // The stream on which the framework currently enqueues work for the parameters' device.
  void* current_stream() const;
  int device_index() const { return device_.index; }

 private:
  // A parameter, as it was when the table was built: what a step looks at fits into a cache line.
  struct Param {
    py::object tensor;
    Implementation direct;                    // if its gradient may be read directly, or null
    TensorKind kind;                          // then
    uint32_t addresses_begin, addresses_end;  // in `addresses_`
    uint32_t layout;  // where its shape, followed by its strides, begins in `layouts_`
    int32_t ndim;
    int32_t entry;  // row of the table, or -1
    dlpack::DataType dtype;
    PyGetSetDef* getter;  // of `grad`, or null if it is no plain attribute
  };
  // One entry of the optimizer's state: if it is a dictionary, with values in `state_values_`.
  struct ParamState {
    py::object entry;
    Py_ssize_t num_values;
  };
  // An address that the table holds, and whose it is.
  struct Address {
    Implementation implementation;
    const void* address;
  };

  bool same_params(const py::list& param_lists) const;
  bool same_states(const py::dict& state);
  bool same_entries() const;
  bool has_strides(const Param& param, const int64_t* found) const;
  bool same_layout(const Param& param, const dlpack::Tensor& tensor) const;
  TensorPointer tensor_at(size_t address) const;
  bool same_addresses(const Param& param) const;
  bool is_in_order(const Param& param) const;
  void prefetch(size_t position, bool reads_directly) const;
  bool collect_all(const py::object& gradients);
  bool collect(const Param& param, py::object gradient);
  bool collect_directly(const Param& param);
  bool take(const Param& param, const dlpack::Tensor& gradient);
  void note(const Param& param, const void* address);
  static py::object gradient_of(const Param& param);

  const TensorAccess& access_;
  dlpack::Device device_{};
  std::vector<Param> params_;
  std::vector<int64_t> layouts_;
  py::dict state_;
  std::vector<ParamState> param_states_;
  std::vector<py::object> state_values_;
  DictVersions state_versions_;  // of `state_` and the dictionaries in it
  std::vector<Address> addresses_;
  std::vector<TensorHandle> handles_;  // of the tensors at `addresses_`
  std::vector<TensorEntry> entries_;
  std::vector<const void*> gradients_;
  std::vector<py::object> held_gradients_;
  std::vector<Implementation> directly_held_;  // tensors by row, undefined ones where none is held
  bool has_gradients_ = false;
  bool has_changed_gradients_ = true;  // some parameter has got or lost its gradient
  py::list updated_params_;
};

}  // namespace lrs
