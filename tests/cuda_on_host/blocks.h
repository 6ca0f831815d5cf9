// Runs CUDA kernels on the host: the blocks of a grid one after the other, and the threads of a
// block as fibers that take turns at barriers and shuffles. Which block or thread goes first can be
// chosen; results must not depend on it. They run at once or, if ON_HOST_RUNTIME is defined, when
// the streams of runtime.h get there.
//
// Reported as std::runtime_error: a barrier or shuffle that some threads never reach, and vector
// accesses that are not aligned. Shared memory is full of 0xff bytes when a block starts.
#pragma once

#include <cstdint>
#include <cstring>
#include <functional>

struct CUstream_st;

namespace on_host {

constexpr unsigned kWarp = 32;

struct Index {
  unsigned x;
};

struct Configuration {
  Configuration(unsigned blocks, unsigned threads, size_t shared_bytes = 0,
                CUstream_st* stream = nullptr);
  unsigned blocks, threads;
  CUstream_st* stream;
};

// Calls `thread` once for each thread of the grid.
void run_grid(const Configuration& configuration, const std::function<void()>& thread);

#ifdef ON_HOST_RUNTIME
// Lets the stream of the launch call `run_grid`.
void enqueue_grid(const Configuration& configuration, std::function<void()> thread);

template <typename Kernel, typename... Arguments>
void launch(const Configuration& configuration, Kernel kernel, const Arguments&... arguments) {
  enqueue_grid(configuration, [=] { kernel(arguments...); });
}
#else
template <typename Kernel, typename... Arguments>
void launch(const Configuration& configuration, Kernel kernel, const Arguments&... arguments) {
  run_grid(configuration, [&] { kernel(arguments...); });
}
#endif

// Waits for the other threads of the block, which must come to the same line.
void sync_block(int line);

// Waits for the lanes of the warp in `mask`, then returns what lane `source` gave as its value.
uint64_t exchange(unsigned mask, uint64_t value, unsigned source, int line);

unsigned lane();

// Overwrites a shared variable unless a thread of the running block has come here before.
void enter_shared(void* variable, size_t bytes);

[[noreturn]] void fail(const char* what);

// `source` as a lane of the same segment of `width` lanes, or this lane if it is in another one.
inline unsigned within_segment(unsigned source, int width) {
  return source / width == lane() / width ? source : lane();
}

template <typename T>
T shuffle(unsigned mask, T value, unsigned source, int line) {
  static_assert(sizeof(T) <= sizeof(uint64_t));
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof(T));
  bits = exchange(mask, bits, source, line);
  std::memcpy(&value, &bits, sizeof(T));
  return value;
}

// A base of vector types whose copies demand aligned addresses, as the device does.
template <int kBytes>
class Aligned {
 public:
  Aligned() = default;
  Aligned(const Aligned& other) { check(this), check(&other); }
  Aligned& operator=(const Aligned& other) {
    check(this), check(&other);
    return *this;
  }

 private:
  static void check(const void* pointer) {
    uintptr_t address = reinterpret_cast<uintptr_t>(pointer);
    asm("" : "+r"(address));  // the compiler takes the alignment of a type for granted
    if (address % kBytes != 0) fail("a vector access is not aligned");
  }
};

}  // namespace on_host
