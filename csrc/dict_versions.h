// Whether any of many Python dictionaries has got, lost or exchanged an entry: a number for each
// tells, where comparing all entries would take a look at each.
//
// Up to Python 3.11 each dictionary has a version (PEP 509), which is another one after each change
// and never comes again. Later ones call a watcher before each change of a dictionary it is set on.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>
#include <unordered_map>
#include <utility>
#include <vector>

namespace lrs {

#if PY_VERSION_HEX < 0x030C0000

// The version of a dictionary, which is there as long as the dictionary.
inline const uint64_t* version_of(PyObject* dict) {
  return &reinterpret_cast<PyDictObject*>(dict)->ma_version_tag;
}

#else

using DictChanges = std::unordered_map<PyObject*, uint64_t>;

// The changes of each watched dictionary. They are there until the interpreter is gone.
inline DictChanges& dict_changes() {
  static auto* const changes = new DictChanges();
  return *changes;
}

inline int count_change(PyDict_WatchEvent event, PyObject* dict, PyObject*, PyObject*) {
  const auto found = dict_changes().find(dict);
  if (found == dict_changes().end()) return 0;
  if (event == PyDict_EVENT_DEALLOCATED) {
    dict_changes().erase(found);
  } else {
    ++found->second;
  }
  return 0;
}

// As above; null if others have taken all watchers that the interpreter has room for.
inline const uint64_t* version_of(PyObject* dict) {
  static const int watcher = PyDict_AddWatcher(&count_change);
  if (watcher < 0 || PyDict_Watch(watcher, dict) != 0) {
    PyErr_Clear();
    return nullptr;
  }
  return &dict_changes()[dict];
}

#endif

class DictVersions {
 public:
  // The dictionary outlives the object.
  void add(PyObject* dict) {
    if (const uint64_t* version = version_of(dict)) {
      versions_.push_back({version, *version});
    } else {
      has_all_ = false;
    }
  }

  // Takes the dictionaries as they are now for unchanged.
  void renew() {
    for (auto& [version, known] : versions_) known = *version;
  }

  bool are_unchanged() const {
    constexpr size_t kAhead = 8;
    for (size_t i = 0; i < versions_.size(); ++i) {
      if (i + kAhead < versions_.size()) __builtin_prefetch(versions_[i + kAhead].first);
      if (*versions_[i].first != versions_[i].second) return false;
    }
    return has_all_;
  }

 private:
  std::vector<std::pair<const uint64_t*, uint64_t>> versions_;
  bool has_all_ = true;
};

}  // namespace lrs
