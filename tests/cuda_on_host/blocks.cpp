#include "blocks.h"

#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <exception>
#include <memory>
#include <numeric>
#include <random>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "cuda_runtime.h"

on_host::Index threadIdx, blockIdx, blockDim, gridDim;

namespace on_host {
namespace {

constexpr unsigned kMaxThreads = 1024;
constexpr size_t kStackBytes = 1 << 16;

enum class State { kReady, kAtBlockBarrier, kAtWarpBarrier, kDone };

// A fiber. It outlives the blocks: once done it waits for the next one.
struct Thread {
  unsigned index = 0;
  State state = State::kDone;
  int line = 0;       // of the barrier where it waits
  unsigned mask = 0;  // of the lanes that it waits for
  uint64_t given = 0, received = 0;
  unsigned source = 0;  // the lane from which it receives
  bool has_context = false;
  jmp_buf context;
  std::unique_ptr<char[]> stack;
};

std::vector<Thread> threads(kMaxThreads);
Thread* current = nullptr;
const std::function<void()>* work = nullptr;
std::exception_ptr error;
jmp_buf scheduler;
std::vector<void*> shared_variables;  // that the running block has entered
std::mt19937 generator;
unsigned order = 0;
int64_t launches = 0, blocks = 0;

void pause(State state) {
  current->state = state;
  if (_setjmp(current->context) == 0) _longjmp(scheduler, 1);
}

void fiber() {
  for (;;) {
    try {
      (*work)();
    } catch (...) {
      error = std::current_exception();
    }
    pause(State::kDone);
  }
}

void start(Thread* thread) {
  thread->has_context = true;
  if (!thread->stack) thread->stack.reset(new char[kStackBytes]);
  ucontext_t context;
  getcontext(&context);
  context.uc_stack.ss_sp = thread->stack.get();
  context.uc_stack.ss_size = kStackBytes;
  context.uc_link = nullptr;
  makecontext(&context, fiber, 0);
  setcontext(&context);
}

// Runs a thread up to its next barrier or its end.
void resume(Thread* thread) {
  current = thread;
  threadIdx.x = thread->index;
  if (_setjmp(scheduler) == 0) {
    if (!thread->has_context) start(thread);
    _longjmp(thread->context, 1);
  }
}

bool waits_at(const Thread& thread, State state, int line) {
  return thread.state == state && thread.line == line;
}

// Lets the lanes that `leader` waits for go on if they are all there.
bool release_lanes(const Thread& leader) {
  const unsigned mask = leader.mask;
  Thread* warp = &threads[leader.index / kWarp * kWarp];
  for (unsigned i = 0; i < kWarp; ++i) {
    if ((mask >> i & 1u) == 0) continue;
    if (!waits_at(warp[i], State::kAtWarpBarrier, leader.line) || warp[i].mask != mask) {
      return false;
    }
  }
  for (unsigned i = 0; i < kWarp; ++i) {
    if ((mask >> i & 1u) == 0) continue;
    warp[i].received = warp[warp[i].source].given;
    warp[i].state = State::kReady;
  }
  return true;
}

bool release_block() {
  const int line = threads[0].line;
  for (unsigned i = 0; i < blockDim.x; ++i) {
    if (!waits_at(threads[i], State::kAtBlockBarrier, line)) return false;
  }
  for (unsigned i = 0; i < blockDim.x; ++i) threads[i].state = State::kReady;
  return true;
}

bool release() {
  bool released = release_block();
  for (unsigned i = 0; i < blockDim.x; ++i) {
    if (threads[i].state == State::kAtWarpBarrier) released |= release_lanes(threads[i]);
  }
  return released;
}

std::string deadlock() {
  std::string message = "threads wait for others that never come:";
  for (unsigned i = 0; i < blockDim.x; ++i) {
    if (threads[i].state == State::kDone) continue;
    return message + " thread " + std::to_string(i) + " of block " + std::to_string(blockIdx.x) +
           " at line " + std::to_string(threads[i].line);
  }
  return message;
}

// Indices below `count` in the order chosen: as numbered, reversed, or shuffled.
std::vector<unsigned> in_order(unsigned count) {
  std::vector<unsigned> indices(count);
  std::iota(indices.begin(), indices.end(), 0u);
  if (order == 1) std::reverse(indices.begin(), indices.end());
  if (order > 1) std::shuffle(indices.begin(), indices.end(), generator);
  return indices;
}

void run_block(unsigned index, const std::vector<unsigned>& turns) {
  ++blocks;
  blockIdx.x = index;
  shared_variables.clear();
  for (unsigned i = 0; i < blockDim.x; ++i) {
    threads[i].index = i;
    threads[i].state = State::kReady;
  }
  do {
    for (const unsigned turn : turns) {
      if (threads[turn].state != State::kReady) continue;
      resume(&threads[turn]);
      if (error) std::rethrow_exception(std::exchange(error, nullptr));
    }
  } while (release());
  for (unsigned i = 0; i < blockDim.x; ++i) {
    if (threads[i].state != State::kDone) throw std::runtime_error(deadlock());
  }
}

}  // namespace

Configuration::Configuration(unsigned blocks, unsigned threads, size_t shared_bytes,
                             CUstream_st* stream)
    : blocks(blocks), threads(threads), stream(stream) {
  if (blocks == 0 || threads == 0 || threads > kMaxThreads) fail("an invalid configuration");
  if (shared_bytes != 0) fail("shared memory of dynamic size is not supported");
}

void run_grid(const Configuration& configuration, const std::function<void()>& thread) {
  ++launches;
  work = &thread;
  blockDim.x = configuration.threads;
  gridDim.x = configuration.blocks;
  generator.seed(order);
  const std::vector<unsigned> turns = in_order(configuration.threads);
  try {
    for (const unsigned index : in_order(configuration.blocks)) run_block(index, turns);
  } catch (...) {
    for (Thread& abandoned : threads) abandoned.has_context = false;
    throw;
  }
}

#ifdef ON_HOST_RUNTIME
extern "C" void on_host_enqueue(CUstream_st* stream, void (*run)(void*), void* data,
                                void (*drop)(void*));

// What a kernel is found to do wrong ends the process: nobody waits for its errors.
void enqueue_grid(const Configuration& configuration, std::function<void()> thread) {
  using Grid = std::pair<Configuration, std::function<void()>>;
  const auto run = [](void* data) noexcept {
    const auto& [configuration, thread] = *static_cast<Grid*>(data);
    run_grid(configuration, thread);
  };
  const auto drop = [](void* data) { delete static_cast<Grid*>(data); };
  on_host_enqueue(configuration.stream, run, new Grid(configuration, std::move(thread)), drop);
}
#endif

void sync_block(int line) {
  current->line = line;
  pause(State::kAtBlockBarrier);
}

uint64_t exchange(unsigned mask, uint64_t value, unsigned source, int line) {
  if ((mask >> lane() & 1u) == 0) fail("the mask of a shuffle leaves the calling lane out");
  if ((mask >> source & 1u) == 0) fail("a shuffle reads from a lane that is not in its mask");
  current->given = value;
  current->source = source;
  current->mask = mask;
  current->line = line;
  pause(State::kAtWarpBarrier);
  return current->received;
}

void enter_shared(void* variable, size_t bytes) {
  const auto end = shared_variables.end();
  if (std::find(shared_variables.begin(), end, variable) != end) return;
  shared_variables.push_back(variable);
  std::memset(variable, 0xff, bytes);
}

unsigned lane() { return current->index % kWarp; }

void fail(const char* what) { throw std::runtime_error(what); }

}  // namespace on_host

// For tests. Order 0: blocks and threads go as numbered; 1: the last first; others: shuffled.
extern "C" {
__attribute__((visibility("default"))) void on_host_set_order(unsigned value) {
  on_host::order = value;
}
__attribute__((visibility("default"))) int64_t on_host_launches() { return on_host::launches; }
__attribute__((visibility("default"))) int64_t on_host_blocks() { return on_host::blocks; }
}
