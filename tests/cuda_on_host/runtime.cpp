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
#include <cuda_runtime_api.h>

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <set>
#include <thread>
#include <utility>
#include <vector>

struct _ts;
extern "C" {
__attribute__((weak)) int PyGILState_Check();
__attribute__((weak)) _ts* PyEval_SaveThread();
__attribute__((weak)) void PyEval_RestoreThread(_ts*);
}

namespace {

using Work = std::function<void()>;

constexpr int kDevices = 2;
constexpr size_t kDeviceBytes = size_t{80} << 30;
constexpr size_t kFilledBytes = size_t{64} << 20;  // longer allocations are not overwritten

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

struct Memory {
  size_t bytes;
  cudaMemoryType type;
  int device;
};

// One thread at a time is in the runtime. Who waits for it lets go of Python: the work that the
// other thread runs may be Python's.
class Lock {
 public:
  Lock() {
    if (mutex.try_lock()) return;
    _ts* const python = PyGILState_Check && PyGILState_Check() ? PyEval_SaveThread() : nullptr;
    mutex.lock();
    if (python) PyEval_RestoreThread(python);
  }
  ~Lock() { mutex.unlock(); }

 private:
  static std::recursive_mutex mutex;
};
std::recursive_mutex Lock::mutex;

// Never destroyed: work that is left at the end of the process may belong to Python.
auto& default_streams = *new std::vector<Stream>{{0}, {1}};
auto& streams = *new std::set<Stream*>{&default_streams[0], &default_streams[1]};
auto& memory = *new std::map<uintptr_t, Memory>;
auto& captures = *new std::vector<std::shared_ptr<Graph>>;  // in progress
auto& graphs = *new std::map<cudaGraph_t, std::shared_ptr<Graph>>;
unsigned long long captures_begun = 0;
bool has_failed = false;  // some work, since a wait has told of it
thread_local int current_device = 0;
thread_local cudaStreamCaptureMode thread_mode = cudaStreamCaptureModeGlobal;
thread_local cudaError_t last_error = cudaSuccess;

cudaError_t fail(cudaError_t error) { return last_error = error; }

cudaError_t invalidate(const std::shared_ptr<Graph>& capture, cudaError_t error) {
  capture->is_valid = false;
  return fail(error);
}

// What a wait for work returns.
cudaError_t outcome() {
  return std::exchange(has_failed, false) ? fail(cudaErrorLaunchFailure) : cudaSuccess;
}

int device_count() {
  const char* visible = std::getenv("CUDA_VISIBLE_DEVICES");
  if (!visible) return kDevices;
  if (*visible == '\0') return 0;
  return std::min<int>(kDevices, 1 + std::count(visible, visible + std::strlen(visible), ','));
}

Stream* stream_of(cudaStream_t handle) {
  const bool is_default = handle == nullptr || handle == cudaStreamLegacy;
  return is_default ? &default_streams[current_device] : reinterpret_cast<Stream*>(handle);
}

Event* event_of(cudaEvent_t handle) { return reinterpret_cast<Event*>(handle); }

// Whether a capture in progress forbids a call of this thread that could wait or allocate.
bool is_forbidden() {
  if (thread_mode == cudaStreamCaptureModeRelaxed) return false;
  bool result = false;
  for (const auto& capture : captures) {
    const bool is_own = capture->thread == std::this_thread::get_id();
    const bool is_global =
        capture->mode == cudaStreamCaptureModeGlobal && thread_mode == cudaStreamCaptureModeGlobal;
    if (capture->mode == cudaStreamCaptureModeRelaxed || !(is_own || is_global)) continue;
    capture->is_valid = false;
    result = true;
  }
  return result;
}

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

const Memory* memory_at(const void* pointer) {
  const auto address = reinterpret_cast<uintptr_t>(pointer);
  auto after = memory.upper_bound(address);
  if (after == memory.begin()) return nullptr;
  const auto& [begin, found] = *--after;
  return address - begin < std::max<size_t>(found.bytes, 1) ? &found : nullptr;
}

cudaError_t allocate(void** pointer, size_t bytes, cudaMemoryType type) {
  Lock lock;
  if (is_forbidden()) return fail(cudaErrorStreamCaptureUnsupported);
  if (posix_memalign(pointer, 512, std::max<size_t>(bytes, 1))) {
    return fail(cudaErrorMemoryAllocation);
  }
  if (bytes <= kFilledBytes) std::memset(*pointer, 0xa5, bytes);
  memory[reinterpret_cast<uintptr_t>(*pointer)] = {bytes, type, current_device};
  return cudaSuccess;
}

cudaError_t release(void* pointer) {
  Lock lock;
  if (is_forbidden()) return fail(cudaErrorStreamCaptureUnsupported);
  run_everything();
  memory.erase(reinterpret_cast<uintptr_t>(pointer));
  std::free(pointer);
  return cudaSuccess;
}

cudaError_t copy(void* target, const void* source, size_t bytes, Stream* stream) {
  Lock lock;
  if (!memory_at(source) && !stream->capture) {
    const auto begin = static_cast<const char*>(source);
    const auto staged = std::make_shared<std::vector<char>>(begin, begin + bytes);
    return enqueue(stream, [=] { std::memcpy(target, staged->data(), bytes); });
  }
  enqueue(stream, [=] { std::memmove(target, source, bytes); });
  if (memory_at(target) || stream->capture) return cudaSuccess;
  run_all(stream);
  return outcome();
}

int not_supported() { return cudaErrorNotSupported; }

}  // namespace

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

// ---- devices

cudaError_t cudaGetDeviceCount(int* count) {
  *count = device_count();
  return *count == 0 ? fail(cudaErrorNoDevice) : cudaSuccess;
}
cudaError_t cudaGetDevice(int* device) { return *device = current_device, cudaSuccess; }
cudaError_t cudaSetDevice(int device) {
  if (device < 0 || device >= device_count()) return fail(cudaErrorInvalidDevice);
  current_device = device;
  return cudaSuccess;
}
cudaError_t cudaMemGetInfo(size_t* free, size_t* total) {
  *free = *total = kDeviceBytes;
  return cudaSuccess;
}
cudaError_t cudaGetDeviceProperties(cudaDeviceProp* properties, int device) {
  *properties = cudaDeviceProp{};
  std::strcpy(properties->name, "CUDA on the host");
  properties->major = 9;
  properties->totalGlobalMem = kDeviceBytes;
  properties->multiProcessorCount = 132;
  properties->warpSize = 32;
  properties->maxThreadsPerBlock = 1024;
  properties->maxThreadsPerMultiProcessor = 2048;
  properties->sharedMemPerBlock = 48 << 10;
  properties->sharedMemPerBlockOptin = 227 << 10;
  properties->regsPerBlock = 65536;
  properties->l2CacheSize = 50 << 20;
  properties->pciBusID = device + 1;
  return cudaSuccess;
}
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  const std::map<int, int> values = {{cudaDevAttrComputeCapabilityMajor, 9},
                                     {cudaDevAttrMultiProcessorCount, 132},
                                     {cudaDevAttrWarpSize, 32},
                                     {cudaDevAttrMemoryClockRate, 2619000},
                                     {cudaDevAttrGlobalMemoryBusWidth, 5120}};
  const auto found = values.find(attribute);
  *value = found == values.end() ? 0 : found->second;
  return cudaSuccess;
}
cudaError_t cudaDeviceGetPCIBusId(char* id, int bytes, int device) {
  std::snprintf(id, bytes, "0000:%02x:00.0", device + 1);
  return cudaSuccess;
}
cudaError_t cudaDriverGetVersion(int* version) { return *version = CUDART_VERSION, cudaSuccess; }
cudaError_t cudaRuntimeGetVersion(int* version) { return *version = CUDART_VERSION, cudaSuccess; }
cudaError_t cudaDeviceCanAccessPeer(int* can, int, int) { return *can = 1, cudaSuccess; }
cudaError_t cudaDeviceEnablePeerAccess(int, unsigned) { return cudaSuccess; }
cudaError_t cudaDeviceGetStreamPriorityRange(int* least, int* greatest) {
  if (least) *least = 0;
  if (greatest) *greatest = -5;
  return cudaSuccess;
}
cudaError_t cudaGetLastError() { return std::exchange(last_error, cudaSuccess); }
cudaError_t cudaPeekAtLastError() { return last_error; }
cudaError_t cudaProfilerStart() { return cudaSuccess; }
cudaError_t cudaProfilerStop() { return cudaSuccess; }

// ---- memory

cudaError_t cudaMalloc(void** pointer, size_t bytes) {
  return allocate(pointer, bytes, cudaMemoryTypeDevice);
}
cudaError_t cudaFree(void* pointer) { return release(pointer); }
cudaError_t cudaHostAlloc(void** pointer, size_t bytes, unsigned) {
  return allocate(pointer, bytes, cudaMemoryTypeHost);
}
cudaError_t cudaFreeHost(void* pointer) { return release(pointer); }
cudaError_t cudaHostRegister(void* pointer, size_t bytes, unsigned) {
  Lock lock;
  memory[reinterpret_cast<uintptr_t>(pointer)] = {bytes, cudaMemoryTypeHost, current_device};
  return cudaSuccess;
}
cudaError_t cudaHostUnregister(void* pointer) {
  Lock lock;
  memory.erase(reinterpret_cast<uintptr_t>(pointer));
  return cudaSuccess;
}
cudaError_t cudaPointerGetAttributes(cudaPointerAttributes* attributes, const void* pointer) {
  Lock lock;
  *attributes = {};
  const Memory* found = memory_at(pointer);
  if (!found) return cudaSuccess;
  attributes->type = found->type;
  attributes->device = found->device;
  attributes->devicePointer = const_cast<void*>(pointer);
  if (found->type == cudaMemoryTypeHost) attributes->hostPointer = const_cast<void*>(pointer);
  return cudaSuccess;
}
cudaError_t cudaMemcpyAsync(void* target, const void* source, size_t bytes, cudaMemcpyKind,
                            cudaStream_t stream) {
  return copy(target, source, bytes, stream_of(stream));
}
cudaError_t cudaMemcpyPeerAsync(void* target, int, const void* source, int, size_t bytes,
                                cudaStream_t stream) {
  return copy(target, source, bytes, stream_of(stream));
}
cudaError_t cudaMemcpy(void* target, const void* source, size_t bytes, cudaMemcpyKind) {
  Lock lock;
  if (is_forbidden()) return fail(cudaErrorStreamCaptureUnsupported);
  run_all(stream_of(nullptr));
  std::memmove(target, source, bytes);
  return outcome();
}
cudaError_t cudaMemset(void* target, int value, size_t bytes) {
  return enqueue(stream_of(nullptr), [=] { std::memset(target, value, bytes); });
}
cudaError_t cudaMemsetAsync(void* target, int value, size_t bytes, cudaStream_t stream) {
  return enqueue(stream_of(stream), [=] { std::memset(target, value, bytes); });
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

// ---- captures and graphs

cudaError_t cudaThreadExchangeStreamCaptureMode(cudaStreamCaptureMode* mode) {
  std::swap(*mode, thread_mode);
  return cudaSuccess;
}
cudaError_t cudaStreamIsCapturing(cudaStream_t handle, cudaStreamCaptureStatus* status) {
  Lock lock;
  const auto capture = stream_of(handle)->capture;
  *status = !capture            ? cudaStreamCaptureStatusNone
            : capture->is_valid ? cudaStreamCaptureStatusActive
                                : cudaStreamCaptureStatusInvalidated;
  return cudaSuccess;
}
#if CUDART_VERSION >= 13000
cudaError_t cudaStreamGetCaptureInfo(cudaStream_t handle, cudaStreamCaptureStatus* status,
                                     unsigned long long* id, cudaGraph_t* graph,
                                     const cudaGraphNode_t** nodes, const cudaGraphEdgeData** edges,
                                     size_t* count) {
  Lock lock;
  const auto capture = stream_of(handle)->capture;
  if (id) *id = capture ? capture->id : 0;
  if (graph) *graph = reinterpret_cast<cudaGraph_t>(capture.get());
  if (nodes) *nodes = nullptr;
  if (edges) *edges = nullptr;
  if (count) *count = 0;
  return cudaStreamIsCapturing(handle, status);
}
#endif
cudaError_t cudaStreamBeginCapture(cudaStream_t handle, cudaStreamCaptureMode mode) {
  Lock lock;
  Stream* stream = stream_of(handle);
  if (stream == stream_of(nullptr)) return fail(cudaErrorStreamCaptureUnsupported);
  if (stream->capture) return fail(cudaErrorIllegalState);
  stream->capture = std::make_shared<Graph>(
      Graph{++captures_begun, mode, std::this_thread::get_id(), {stream}, {}});
  captures.push_back(stream->capture);
  return cudaSuccess;
}
cudaError_t cudaStreamEndCapture(cudaStream_t handle, cudaGraph_t* graph) {
  Lock lock;
  *graph = nullptr;
  const auto capture = stream_of(handle)->capture;
  if (!capture) return fail(cudaErrorIllegalState);
  for (Stream* stream : capture->streams) stream->capture.reset();
  capture->streams.clear();
  captures.erase(std::find(captures.begin(), captures.end(), capture));
  if (!capture->is_valid) return fail(cudaErrorStreamCaptureInvalidated);
  *graph = reinterpret_cast<cudaGraph_t>(capture.get());
  graphs[*graph] = capture;
  return cudaSuccess;
}
cudaError_t cudaGraphInstantiateWithFlags(cudaGraphExec_t* executable, cudaGraph_t graph,
                                          unsigned long long) {
  Lock lock;
  const auto* works = new std::shared_ptr<Graph>(graphs.at(graph));
  *executable = reinterpret_cast<cudaGraphExec_t>(const_cast<std::shared_ptr<Graph>*>(works));
  return cudaSuccess;
}
cudaError_t cudaGraphInstantiate(cudaGraphExec_t* executable, cudaGraph_t graph,
                                 unsigned long long flags) {
  return cudaGraphInstantiateWithFlags(executable, graph, flags);
}
cudaError_t cudaGraphLaunch(cudaGraphExec_t executable, cudaStream_t stream) {
  const auto graph = *reinterpret_cast<std::shared_ptr<Graph>*>(executable);
  return enqueue(stream_of(stream), [=] {
    for (const Work& work : graph->works) work();
  });
}
cudaError_t cudaGraphDestroy(cudaGraph_t graph) {
  Lock lock;
  graphs.erase(graph);
  return cudaSuccess;
}
cudaError_t cudaGraphExecDestroy(cudaGraphExec_t executable) {
  delete reinterpret_cast<std::shared_ptr<Graph>*>(executable);
  return cudaSuccess;
}
cudaError_t cudaGraphGetNodes(cudaGraph_t graph, cudaGraphNode_t*, size_t* count) {
  Lock lock;
  *count = graphs.at(graph)->works.size();
  return cudaSuccess;
}

// ---- kernels of torch, and what it looks up in the driver

cudaError_t cudaLaunchKernel(const void*, dim3, dim3, void**, size_t, cudaStream_t) {
  return cudaSuccess;
}
cudaError_t __cudaLaunchKernel(cudaKernel_t, dim3, dim3, void**, size_t, cudaStream_t) {
  return cudaSuccess;
}
cudaError_t __cudaGetKernel(cudaKernel_t* kernel, const void*) {
  return *kernel = nullptr, cudaSuccess;
}
void** __cudaRegisterFatBinary(void*) {
  static void* handle;
  return &handle;
}
void __cudaRegisterFatBinaryEnd(void**) {}
void __cudaUnregisterFatBinary(void**) {}
void __cudaRegisterFunction(void**, const char*, char*, const char*, int, uint3*, uint3*, dim3*,
                            dim3*, int*) {}
void __cudaRegisterVar(void**, char*, char*, const char*, int, size_t, int, int) {}
char __cudaInitModule(void**) { return 0; }
unsigned __cudaPushCallConfiguration(dim3, dim3, size_t, CUstream_st*) { return 0; }
cudaError_t __cudaPopCallConfiguration(dim3* blocks, dim3* threads, size_t* bytes, void* stream) {
  *blocks = *threads = {1, 1, 1};
  *bytes = 0;
  *static_cast<void**>(stream) = nullptr;
  return cudaSuccess;
}
int cuDevicePrimaryCtxGetState(int, unsigned* flags, int* is_active) {
  *flags = 0;
  *is_active = 1;
  return cudaSuccess;
}
cudaError_t cudaGetDriverEntryPointByVersion(const char* name, void** function, unsigned,
                                             unsigned long long,
                                             cudaDriverEntryPointQueryResult* result) {
  const bool is_state = std::strcmp(name, "cuDevicePrimaryCtxGetState") == 0;
  *function = is_state ? reinterpret_cast<void*>(cuDevicePrimaryCtxGetState)
                       : reinterpret_cast<void*>(not_supported);
  if (result) *result = cudaDriverEntryPointSuccess;
  return cudaSuccess;
}

}  // extern "C"
