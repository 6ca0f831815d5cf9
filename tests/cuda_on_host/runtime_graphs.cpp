// Captures and graphs.
#include <algorithm>
#include <map>
#include <utility>

#include "runtime.h"

namespace runtime {

auto& captures = *new std::vector<std::shared_ptr<Graph>>;  // in progress
auto& graphs = *new std::map<cudaGraph_t, std::shared_ptr<Graph>>;
unsigned long long captures_begun = 0;
thread_local cudaStreamCaptureMode thread_mode = cudaStreamCaptureModeGlobal;

cudaError_t invalidate(const std::shared_ptr<Graph>& capture, cudaError_t error) {
  capture->is_valid = false;
  return fail(error);
}

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

}  // namespace runtime

using namespace runtime;

extern "C" {

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

}  // extern "C"
