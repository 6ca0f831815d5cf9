// Threads of OpenMP in a forked process: there are none, but OpenMP would wait for those that it
// kept for the thread that forked.
#pragma once

#include <pthread.h>

namespace lrs {

inline thread_local bool has_threads = false, has_lost_threads = false;

inline void lose_threads() { has_lost_threads |= has_threads; }

// Whether a parallel region, which then comes next, may start in this thread.
inline bool take_threads() {
  static const int registered = pthread_atfork(nullptr, nullptr, &lose_threads);
  has_threads = true;
  return registered == 0 && !has_lost_threads;
}

}  // namespace lrs
