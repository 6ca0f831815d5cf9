// Parameter groups, which are Python dictionaries, and the schedules in the rows of their learning
// rates. As long as they are what somebody has seen, there is no need to look again.
#pragma once

#include <pybind11/pybind11.h>

#include "dict_versions.h"

namespace lrs {

namespace py = pybind11;

class KnownGroups {
 public:
  // What is there from now on, until `confirm`, is about to be seen.
  void look_at(const py::list& groups, const py::list& schedules) {
    is_known_ = false;
    schedules_ = copy(schedules);
    if (are_same(groups, groups_)) {
      versions_.renew();
      return;
    }
    groups_ = copy(groups);
    versions_ = {};
    are_plain_ = true;
    for (const py::handle& group : groups_) {
      are_plain_ &= PyDict_CheckExact(group.ptr()) != 0;  // no class of its own hides a change
      if (are_plain_) versions_.add(group.ptr());
    }
  }

  // Says that all of it has been seen, and is of a kind that only changes by being replaced.
  void confirm() { is_known_ = are_plain_; }

  void forget() { is_known_ = false; }

  bool are_unchanged(const py::list& groups, const py::list& schedules) const {
    return is_known_ && are_same(schedules, schedules_) && have_same_entries(groups);
  }

  // Calls what changes entries of the groups, for which groups that are unchanged stay so.
  template <typename Change>
  void change(const py::list& groups, const Change& change) {
    const bool are_known = is_known_ && have_same_entries(groups);
    change();
    if (are_known) versions_.renew();
  }

  // Puts a value, if it is not None, into each group, for which groups that are unchanged stay so.
  void put(const py::list& groups, const py::str& key, const py::list& values) {
    change(groups, [&] {
      for (size_t i = 0; i < values.size(); ++i) {
        const py::object value = values[i];
        if (!value.is_none()) groups[i][key] = value;
      }
    });
  }

 private:
  static py::list copy(const py::list& list) {
    return py::reinterpret_steal<py::list>(
        PyList_GetSlice(list.ptr(), 0, PyList_GET_SIZE(list.ptr())));
  }

  static bool are_same(const py::list& present, const py::list& known) {
    const Py_ssize_t size = PyList_GET_SIZE(present.ptr());
    if (size != PyList_GET_SIZE(known.ptr())) return false;
    for (Py_ssize_t i = 0; i < size; ++i) {
      if (PyList_GET_ITEM(present.ptr(), i) != PyList_GET_ITEM(known.ptr(), i)) return false;
    }
    return true;
  }

  bool have_same_entries(const py::list& groups) const {
    return are_same(groups, groups_) && versions_.are_unchanged();
  }

  py::list groups_, schedules_;
  DictVersions versions_;
  bool are_plain_ = false, is_known_ = false;
};

}  // namespace lrs
