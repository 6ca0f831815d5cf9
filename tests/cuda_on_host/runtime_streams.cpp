// Streams, events and the work that waits in them.
#include <set>
#include <utility>

#include "runtime.h"

struct _ts;
extern "C" {
__attribute__((weak)) int PyGILState_Check();
__attribute__((weak)) _ts* PyEval_SaveThread();
__attribute__((weak)) void PyEval_RestoreThread(_ts*);
}

namespace runtime {

std::recursive_mutex Lock::mutex;

Lock::Lock() {
  if (mutex.try_lock()) return;
  _ts* const python = PyGILState_Check && PyGILState_Check() ? PyEval_SaveThread() : nullptr;
  mutex.lock();
  if (python) PyEval_RestoreThread(python);
}

// Never destroyed: work that is left at the end of the process may belong to Python.
auto& default_streams = *new std::vector<Stream>{{0}, {1}};
auto& streams = *new std::set<Stream*>{&default_streams[0], &default_streams[1]};
bool has_failed = false;  // some work, since a wait has told of it
thread_local int current_device = 0;
thread_local cudaError_t last_error = cudaSuccess;

cudaError_t outcome() {
  return std::exchange(has_failed, false) ? fail(cudaErrorLaunchFailure) : cudaSuccess;
}

Stream* stream_of(cudaStream_t handle) {
  const bool is_default = handle == nullptr || handle == cudaStreamLegacy;
  return is_default ? &default_streams[current_device] : reinterpret_cast<Stream*>(handle);
}

Event* event_of(cudaEvent_t handle) { return reinterpret_cast<Event*>(handle); }

void run_one(Stream* stream) {
  if (stream->queue.empty()) return;
  const Work work = std::move(stream->queue.front());
  stream->queue.pop_front();
  work();
}

void run_until(Stream* stream, const bool& is_done) {
  while (!is_done) run_one(stream);
}

void run_all(Stream* stream) {
  while (!stream->queue.empty()) run_one(stream);
}

void run_device(int device) {
  for (Stream* stream : std::set<Stream*>(streams)) {
    if (stream->device == device) run_all(stream);
  }
}

void run_everything() {
  for (int device = 0; device < kDevices; ++device) run_device(device);
}

cudaError_t enqueue(Stream* stream, Work work) {
  Lock lock;
  if (stream->capture) {
    stream->capture->works.push_back(std::move(work));
  } else {
    stream->queue.push_back(std::move(work));
  }
  return cudaSuccess;
}

}  // namespace runtime

using namespace runtime;

extern "C" {

// Puts run(data) into a stream, and calls drop(data) once it will not run any more.
void on_host_enqueue(cudaStream_t stream, void (*run)(void*), void* data, void (*drop)(void*)) {
  const std::shared_ptr<void> kept(data, drop);
  enqueue(stream_of(stream), [=] { run(kept.get()); });
}

// For work that finds that it cannot do what it should: a wait returns an error.
void on_host_fail() {
  Lock lock;
  has_failed = true;
}

// Runs what waits in all streams.
cudaError_t on_host_run_everything() {
  Lock lock;
  run_everything();
  return outcome();
}

// ---- streams

// Only streams that do not wait for the default one, as all of torch: the others are not told
// apart.
cudaError_t cudaStreamCreateWithPriority(cudaStream_t* stream, unsigned flags, int priority) {
  Lock lock;
  if (flags != cudaStreamNonBlocking) return fail(cudaErrorNotSupported);
  auto* created = new Stream{current_device, priority};
  streams.insert(created);
  *stream = reinterpret_cast<cudaStream_t>(created);
  return cudaSuccess;
}
cudaError_t cudaStreamCreateWithFlags(cudaStream_t* stream, unsigned flags) {
  return cudaStreamCreateWithPriority(stream, flags, 0);
}
// Events may still speak of it.
cudaError_t cudaStreamDestroy(cudaStream_t stream) {
  Lock lock;
  run_all(stream_of(stream));
  streams.erase(stream_of(stream));
  return cudaSuccess;
}
cudaError_t cudaStreamGetPriority(cudaStream_t stream, int* priority) {
  return *priority = stream_of(stream)->priority, cudaSuccess;
}
cudaError_t cudaStreamSynchronize(cudaStream_t handle) {
  Lock lock;
  Stream* stream = stream_of(handle);
  if (stream->capture) return invalidate(stream->capture, cudaErrorStreamCaptureUnsupported);
  if (is_forbidden()) return fail(cudaErrorStreamCaptureUnsupported);
  run_all(stream);
  return outcome();
}
cudaError_t cudaDeviceSynchronize() {
  Lock lock;
  if (is_forbidden()) return fail(cudaErrorStreamCaptureUnsupported);
  run_device(current_device);
  return outcome();
}
cudaError_t cudaStreamQuery(cudaStream_t handle) {
  Lock lock;
  Stream* stream = stream_of(handle);
  if (stream->capture) return invalidate(stream->capture, cudaErrorStreamCaptureUnsupported);
  if (is_forbidden()) return fail(cudaErrorStreamCaptureUnsupported);
  run_one(stream);
  return stream->queue.empty() ? cudaSuccess : cudaErrorNotReady;
}
cudaError_t cudaLaunchHostFunc(cudaStream_t stream, cudaHostFn_t function, void* data) {
  return enqueue(stream_of(stream), [=] { function(data); });
}
cudaError_t cudaStreamAddCallback(cudaStream_t stream, cudaStreamCallback_t callback, void* data,
                                  unsigned) {
  return enqueue(stream_of(stream), [=] { callback(stream, cudaSuccess, data); });
}

// ---- events

cudaError_t cudaEventCreateWithFlags(cudaEvent_t* event, unsigned) {
  *event = reinterpret_cast<cudaEvent_t>(new Event{current_device});
  return cudaSuccess;
}
cudaError_t cudaEventCreate(cudaEvent_t* event) { return cudaEventCreateWithFlags(event, 0); }
cudaError_t cudaEventDestroy(cudaEvent_t event) {
  delete event_of(event);
  return cudaSuccess;
}
cudaError_t cudaEventRecordWithFlags(cudaEvent_t handle, cudaStream_t in, unsigned) {
  Lock lock;
  Event* event = event_of(handle);
  Stream* stream = stream_of(in);
  if (event->device != stream->device) return fail(cudaErrorInvalidResourceHandle);
  const auto is_done = std::make_shared<bool>(false);
  *event = {event->device, stream, is_done, stream->capture};
  if (stream->capture) return cudaSuccess;
  return enqueue(stream, [=] { *is_done = true; });
}
cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t stream) {
  return cudaEventRecordWithFlags(event, stream, 0);
}
// A capture grows by the streams that wait for one of its events. Its work runs one after another
// in any case: a graph misses no dependency that the host has not seen.
cudaError_t cudaStreamWaitEvent(cudaStream_t handle, cudaEvent_t waited_for, unsigned) {
  Lock lock;
  Stream* stream = stream_of(handle);
  const Event event = *event_of(waited_for);
  if (!event.stream) return cudaSuccess;
  if (!event.capture) {
    if (stream->capture) return invalidate(stream->capture, cudaErrorStreamCaptureIsolation);
    return enqueue(stream, [=] { run_until(event.stream, *event.is_done); });
  }
  if (event.capture->streams.empty()) return fail(cudaErrorCapturedEvent);  // that has ended
  if (stream->capture == event.capture) return cudaSuccess;
  if (stream->capture) {
    invalidate(event.capture, cudaErrorStreamCaptureMerge);
    return invalidate(stream->capture, cudaErrorStreamCaptureMerge);
  }
  stream->capture = event.capture;
  stream->capture->streams.push_back(stream);
  return cudaSuccess;
}
cudaError_t cudaEventQuery(cudaEvent_t handle) {
  Lock lock;
  Event* event = event_of(handle);
  if (event->capture) return invalidate(event->capture, cudaErrorCapturedEvent);
  if (is_forbidden()) return fail(cudaErrorStreamCaptureUnsupported);
  if (!event->stream || *event->is_done) return cudaSuccess;
  run_one(event->stream);
  return cudaErrorNotReady;
}
cudaError_t cudaEventSynchronize(cudaEvent_t handle) {
  Lock lock;
  Event* event = event_of(handle);
  if (event->capture) return invalidate(event->capture, cudaErrorCapturedEvent);
  if (is_forbidden()) return fail(cudaErrorStreamCaptureUnsupported);
  if (event->stream) run_until(event->stream, *event->is_done);
  return outcome();
}
cudaError_t cudaEventElapsedTime(float* milliseconds, cudaEvent_t, cudaEvent_t) {
  return *milliseconds = 0.01f, cudaSuccess;
}

}  // extern "C"
