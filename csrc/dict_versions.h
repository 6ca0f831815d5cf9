// Whether any of many Python dictionaries has got, lost or exchanged an entry: a number tells,
// where comparing all entries would take a look at each.
//
// Up to Python 3.11 each dictionary has a version (PEP 509), which is another one after each change
// and never comes again. Later ones call a watcher before each change of a dictionary it is set on.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>
#include <utility>
#include <vector>

namespace lrs {

// What the dictionaries belong to: a change of one kind says nothing of the others.
enum class DictKind { kGroup, kState };

#if PY_VERSION_HEX < 0x030C0000

template <DictKind>
class DictVersions {
 public:
  // The dictionary outlives the object.
  void add(PyObject* dict) { versions_.push_back({dict, version(dict)}); }

  // Takes the dictionaries as they are now for unchanged.
  void renew() {
    for (auto& [dict, known] : versions_) known = version(dict);
  }

  bool are_unchanged() const {
    constexpr size_t kAhead = 8;
    for (size_t i = 0; i < versions_.size(); ++i) {
      if (i + kAhead < versions_.size()) __builtin_prefetch(versions_[i + kAhead].first);
      if (version(versions_[i].first) != versions_[i].second) return false;
    }
    return true;
  }

 private:
  static uint64_t version(PyObject* dict) {
    return reinterpret_cast<PyDictObject*>(dict)->ma_version_tag;
  }

  std::vector<std::pair<PyObject*, uint64_t>> versions_;
};

#else

template <DictKind kKind>
class DictVersions {
 public:
  void add(PyObject* dict) {
    if (watcher() < 0 || PyDict_Watch(watcher(), dict) != 0) {
      PyErr_Clear();
      is_watching_ = false;
    }
    renew();
  }

  void renew() { known_ = changes_; }

  bool are_unchanged() const { return is_watching_ && known_ == changes_; }

 private:
  // Changes of any watched dictionary of the kind: another optimizer's look like our own, for which
  // all is compared once more.
  static inline uint64_t changes_ = 0;

  static int count(PyDict_WatchEvent, PyObject*, PyObject*, PyObject*) {
    ++changes_;
    return 0;
  }

  // The number of our watcher, -1 if others have taken all that the interpreter has room for.
  static int watcher() {
    static const int watcher = PyDict_AddWatcher(&count);
    return watcher;
  }

  bool is_watching_ = true;
  uint64_t known_ = 0;
};

#endif

}  // namespace lrs
