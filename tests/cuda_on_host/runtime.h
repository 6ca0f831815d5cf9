// The CUDA runtime without a GPU. Preloaded, it takes the place of libcudart under torch.
//
// The memory of both devices is host memory, full of 0xa5 bytes when allocated. A stream is a queue
// of work (copies, kernels, records of events, waits for them) that runs as late as CUDA permits:
// when somebody synchronizes. A query runs one piece of work, so that loops of queries end. What
// the host has overwritten, or what another stream has not computed by then, shows in the numbers.
//
// Copies read page-locked memory when they run, pageable memory when they are asked for; those to
// pageable memory wait. A capture keeps the work of its streams, which runs when its graph does;
// what CUDA forbids meanwhile returns CUDA's error and invalidates the capture.
//
// The kernels of torch do nothing: tests/torch_on_host.py puts others in their place. Functions
// that are missing here are those of the real libcudart, which finds no driver.
#pragma once

#include <cuda_runtime_api.h>

#include <deque>
#include <functional>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

namespace runtime {

using Work = std::function<void()>;

constexpr int kDevices = 2;

struct Stream;

// A capture while it is in progress, then what it has captured.
struct Graph {
  unsigned long long id;
  cudaStreamCaptureMode mode;
  std::thread::id thread;        // that has begun it
  std::vector<Stream*> streams;  // those that take part; empty once it has ended
  std::vector<Work> works;
  bool is_valid = true;
};

struct Stream {
  int device, priority = 0;
  std::deque<Work> queue = {};
  std::shared_ptr<Graph> capture = nullptr;
};

// The last record of an event, in a stream or in a capture.
struct Event {
  int device;
  Stream* stream = nullptr;
  std::shared_ptr<bool> is_done = nullptr;
  std::shared_ptr<Graph> capture = nullptr;
};

// One thread at a time is in the runtime. Who waits for it lets go of Python: the work that the
// other thread runs may be Python's.
class Lock {
 public:
  Lock();
  ~Lock() { mutex.unlock(); }

 private:
  static std::recursive_mutex mutex;
};

extern thread_local int current_device;
extern thread_local cudaError_t last_error;

inline cudaError_t fail(cudaError_t error) { return last_error = error; }

Stream* stream_of(cudaStream_t handle);

cudaError_t enqueue(Stream* stream, Work work);

void run_all(Stream* stream);
void run_device(int device);
void run_everything();

// What a wait for work returns.
cudaError_t outcome();

cudaError_t invalidate(const std::shared_ptr<Graph>& capture, cudaError_t error);

// Whether a capture in progress forbids a call of this thread that could wait or allocate.
bool is_forbidden();

}  // namespace runtime
