// Runs CUDA kernels on one host thread, and catches what a GPU would leave undefined.
//
// Each CUDA thread is a fiber that runs until it waits for others: in a shuffle, at a block's barrier, at a cluster's.
// A warp runs as far as it can before the next one starts, in an order that the caller chooses: data that were not
// waited for are then not there. Block memory is filled with NaN before a block starts and after it has ended.
// Buffers end (or start) at a page that may not be touched.
#include <setjmp.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>
#include <ucontext.h>
#include <unistd.h>

#include <algorithm>
#include <map>
#include <string>
#include <vector>

#include "cuda/kernels.h"
#include "cuda/machine.cuh"

uint3 threadIdx;
uint3 blockIdx;
dim3 gridDim;

namespace emulator {

Limits device_limits = {8, 227 * 1024};

namespace {

constexpr int kWarp = gft_megatron::cuda::kWarp;
constexpr int kMostThreads = 1024;
constexpr int kMostBlocks = 8;  // of a cluster
constexpr size_t kStackBytes = 64 * 1024;
constexpr size_t kMemoryBytes = 256 * 1024;

enum class State { kReady, kShuffle, kBarrier, kCluster, kDone };

struct Thread {
  ucontext_t start;
  jmp_buf resume;
  bool started;
  State state;
  int block;  // in the cluster
  uint3 thread_index;
  uint64_t sent[2];  // a lane may be one shuffle ahead of the others
  int lane_xor[2];
  int shuffles;
  int arrivals;
  int waits;
};

struct Block {
  uint3 index;
  unsigned char* memory;
  bool over;
};

std::vector<Thread> threads(kMostThreads* kMostBlocks);
std::vector<Block> blocks(kMostBlocks);
unsigned char* stacks = nullptr;
unsigned char* memories = nullptr;
Thread* current = nullptr;
Launch shape;
void (*thread_function)(const void*);
const void* thread_closure;
jmp_buf scheduler;
sigjmp_buf failure;
std::string error;
uint64_t order_seed = 0;
bool backwards = false;

size_t page_size() { return static_cast<size_t>(sysconf(_SC_PAGESIZE)); }

unsigned char* map_memory(size_t bytes) {
  void* p = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (p == MAP_FAILED) {
    perror("mmap");
    abort();
  }
  return static_cast<unsigned char*>(p);
}

// In the chosen order.
std::vector<int> ordered(int count, uint64_t salt) {
  std::vector<int> order(count);
  for (int i = 0; i < count; ++i) order[i] = backwards ? count - 1 - i : i;
  uint64_t state = order_seed * 6364136223846793005u + salt;
  for (int i = count - 1; order_seed != 0 && i > 0; --i) {
    state = state * 6364136223846793005u + 1442695040888963407u;
    std::swap(order[i], order[(state >> 33) % (i + 1)]);
  }
  return order;
}

[[gnu::noinline]] void yield() {
  if (_setjmp(current->resume) == 0) _longjmp(scheduler, 1);
}

void fiber_main() {
  for (;;) {
    thread_function(thread_closure);
    current->state = State::kDone;
    yield();
  }
}

[[gnu::noinline]] void resume(Thread& thread) {
  current = &thread;
  threadIdx = thread.thread_index;
  blockIdx = blocks[thread.block].index;
  if (_setjmp(scheduler) != 0) return;
  if (thread.started) _longjmp(thread.resume, 1);
  thread.started = true;
  setcontext(&thread.start);
}

void wait_in(State state) {
  current->state = state;
  yield();
}

// True if any lane moved.
bool run_warp(Thread* lanes) {
  bool moved = false;
  for (;;) {
    for (int k = 0; k < kWarp; ++k) {
      Thread& lane = lanes[backwards ? kWarp - 1 - k : k];
      if (lane.state != State::kReady) continue;
      resume(lane);
      moved = true;
    }
    const auto waits = std::count_if(lanes, lanes + kWarp, [](Thread& t) { return t.state == State::kShuffle; });
    if (waits != kWarp) return moved;
    for (int k = 0; k < kWarp; ++k) lanes[k].state = State::kReady;
  }
}

bool run_block(Block& block, Thread* first) {
  bool moved = false;
  for (;;) {
    bool step = false;
    for (const int warp : ordered(shape.threads / kWarp, block.index.x)) step |= run_warp(first + warp * kWarp);
    const auto count = [&](State state) {
      return std::count_if(first, first + shape.threads, [&](Thread& t) { return t.state == state; });
    };
    if (count(State::kBarrier) == shape.threads) {
      for (int k = 0; k < shape.threads; ++k) first[k].state = State::kReady;
      step = true;
    }
    if (!block.over && count(State::kDone) == shape.threads) {
      block.over = true;
      memset(block.memory, 0xff, shape.memory_bytes);
    }
    if (!step) return moved;
    moved = true;
  }
}

void run_cluster(int64_t first_block, int64_t block_y) {
  const int num_threads = shape.cluster * shape.threads;
  for (int b = 0; b < shape.cluster; ++b) {
    unsigned char* end = memories + (b + 1) * (kMemoryBytes + page_size()) - page_size();
    blocks[b].index = {static_cast<unsigned>(first_block + b), static_cast<unsigned>(block_y), 0};
    blocks[b].memory = end - (shape.memory_bytes + 15) / 16 * 16;
    blocks[b].over = false;
    memset(blocks[b].memory, 0xff, end - blocks[b].memory);
  }
  for (int t = 0; t < num_threads; ++t) {
    Thread& thread = threads[t];
    thread.state = State::kReady;
    thread.block = t / shape.threads;
    thread.thread_index = {static_cast<unsigned>(t % shape.threads), 0, 0};
    thread.shuffles = thread.arrivals = thread.waits = 0;
  }
  for (;;) {
    bool moved = false;
    for (const int b : ordered(shape.cluster, first_block)) moved |= run_block(blocks[b], &threads[b * shape.threads]);
    int arrivals = threads[0].arrivals;
    bool done = true;
    for (int t = 0; t < num_threads; ++t) {
      arrivals = std::min(arrivals, threads[t].arrivals);
      done &= threads[t].state == State::kDone;
    }
    if (done) return;
    for (int t = 0; t < num_threads; ++t) {
      if (threads[t].state != State::kCluster || threads[t].waits >= arrivals) continue;
      ++threads[t].waits;
      threads[t].state = State::kReady;
      moved = true;
    }
    if (moved) continue;
    current = nullptr;  // not the fault of a single thread
    std::map<State, int> counts;
    for (int t = 0; t < num_threads; ++t) ++counts[threads[t].state];
    fail("block (%lld, %lld): %d threads wait in a shuffle, %d at a barrier and %d at the cluster's, %d have ended",
         static_cast<long long>(first_block), static_cast<long long>(block_y), counts[State::kShuffle],
         counts[State::kBarrier], counts[State::kCluster], counts[State::kDone]);
  }
}

void forget_fibers() {
  for (int t = 0; t < kMostThreads * kMostBlocks; ++t) {
    Thread& thread = threads[t];
    thread.started = false;
    getcontext(&thread.start);
    thread.start.uc_stack.ss_sp = stacks + t * kStackBytes;
    thread.start.uc_stack.ss_size = kStackBytes;
    thread.start.uc_link = nullptr;
    makecontext(&thread.start, fiber_main, 0);
  }
}

void on_fault(int, siginfo_t* info, void*) { fail("touched %p, which is outside of every buffer", info->si_addr); }

void check_shape() {
  const bool fits = shape.threads >= kWarp && shape.threads <= kMostThreads && shape.threads % kWarp == 0 &&
                    shape.blocks >= 1 && shape.blocks <= 0x7fffffff && shape.blocks_y >= 1 && shape.blocks_y <= 65535 &&
                    shape.cluster >= 1 && shape.cluster <= device_limits.cluster && shape.blocks % shape.cluster == 0 &&
                    shape.memory_bytes >= 0 && shape.memory_bytes <= device_limits.memory_bytes;
  if (!fits) {
    fail("a GPU refuses blocks (%lld, %lld) of %d threads and %lld bytes in clusters of %d",
         static_cast<long long>(shape.blocks), static_cast<long long>(shape.blocks_y), shape.threads,
         static_cast<long long>(shape.memory_bytes), shape.cluster);
  }
}

}  // namespace

void fail(const char* format, ...) {
  char text[512];
  va_list arguments;
  va_start(arguments, format);
  int length = 0;
  if (current != nullptr) {
    length = snprintf(text, sizeof(text), "thread %u of block (%u, %u): ", threadIdx.x, blockIdx.x, blockIdx.y);
  }
  vsnprintf(text + length, sizeof(text) - length, format, arguments);
  va_end(arguments);
  error = text;
  siglongjmp(failure, 1);
}

uint64_t exchange(uint64_t bits, unsigned mask, int lane_xor) {
  if (mask != ~0u) fail("a shuffle of a part of a warp");
  const int slot = current->shuffles++ % 2;
  current->sent[slot] = bits;
  current->lane_xor[slot] = lane_xor;
  wait_in(State::kShuffle);
  const Thread* lanes = current - threadIdx.x % kWarp;
  const Thread& other = lanes[(threadIdx.x % kWarp) ^ lane_xor];
  if (other.lane_xor[slot] != lane_xor) fail("lanes meet in different shuffles");
  return other.sent[slot];
}

void block_barrier() { wait_in(State::kBarrier); }

void cluster_arrive() {
  if (current->arrivals != current->waits) fail("arrives at the cluster's barrier twice");
  ++current->arrivals;
}

void cluster_wait() {
  if (current->arrivals == current->waits) fail("waits at the cluster's barrier before it has arrived");
  wait_in(State::kCluster);
}

int cluster_size() { return shape.cluster; }

unsigned char* block_memory(int rank) { return blocks[rank < 0 ? current->block : rank].memory; }

void check_alignment(const void* p) {
  if (reinterpret_cast<uintptr_t>(p) % 16 != 0) fail("moves 16 bytes at %p, which is not aligned", p);
}

bool run(const Launch& launch, void (*thread)(const void*), const void* closure) {
  if (stacks == nullptr) {
    stacks = map_memory(kMostThreads * kMostBlocks * kStackBytes);
    memories = map_memory(kMostBlocks * (kMemoryBytes + page_size()));
    for (int b = 1; b <= kMostBlocks; ++b) {
      mprotect(memories + b * (kMemoryBytes + page_size()) - page_size(), page_size(), PROT_NONE);
    }
    forget_fibers();
  }
  shape = launch;
  thread_function = thread;
  thread_closure = closure;
  gridDim = dim3(static_cast<unsigned>(shape.blocks), static_cast<unsigned>(shape.blocks_y));
  error.clear();
  struct sigaction handler = {}, before_segv = {}, before_bus = {};
  handler.sa_sigaction = on_fault;
  handler.sa_flags = SA_SIGINFO;
  sigaction(SIGSEGV, &handler, &before_segv);
  sigaction(SIGBUS, &handler, &before_bus);
  if (sigsetjmp(failure, 1) == 0) {
    check_shape();
    const int clusters = static_cast<int>(shape.blocks / shape.cluster);
    for (const int y : ordered(static_cast<int>(shape.blocks_y), 1)) {
      for (const int x : ordered(clusters, 2)) run_cluster(int64_t{x} * shape.cluster, y);
    }
  } else {
    forget_fibers();
  }
  current = nullptr;
  sigaction(SIGSEGV, &before_segv, nullptr);
  sigaction(SIGBUS, &before_bus, nullptr);
  return error.empty();
}

}  // namespace emulator

// What the tests call.
extern "C" {

using namespace gft_megatron;

const char* emulator_error() { return emulator::error.c_str(); }

// seed 0: blocks and warps one after the other; any other shuffles them.
void emulator_order(uint64_t seed, bool backwards) {
  emulator::order_seed = seed;
  emulator::backwards = backwards;
}

void emulator_limits(int cluster, int64_t memory_bytes) { emulator::device_limits = {cluster, memory_bytes}; }

// `bytes` that end where a page begins that may not be touched, and start no page before such another.
void* guarded_alloc(size_t bytes, bool at_start) {
  const size_t page = emulator::page_size();
  const size_t inner = (bytes + page - 1) / page * page;
  unsigned char* base = emulator::map_memory(inner + 2 * page);
  mprotect(base, page, PROT_NONE);
  mprotect(base + page + inner, page, PROT_NONE);
  return at_start ? base + page : base + page + inner - bytes;
}

void guarded_free(void* p, size_t bytes) {
  const size_t page = emulator::page_size();
  munmap(reinterpret_cast<unsigned char*>(reinterpret_cast<uintptr_t>(p) / page * page) - page,
         (bytes + page - 1) / page * page + 2 * page);
}

int64_t emulated_row_stats_splits(int64_t num_rows, int64_t width) { return cuda::row_stats_splits(num_rows, width); }
int emulated_row_stats(const StatsParams* params, int64_t splits) { return cuda::row_stats(*params, splits, nullptr); }
int emulated_merge_stats(const MergeParams* params) { return cuda::merge_stats(*params, nullptr); }
int emulated_combine_stats(const CombineParams* params) { return cuda::combine_stats(*params, nullptr); }
int emulated_row_grad(const GradParams* params) { return cuda::row_grad(*params, nullptr); }
int emulated_rectified_sweep(const SweepParams* params) { return cuda::rectified_sweep(*params, nullptr); }
int emulated_segment_sums(const SegmentSumParams* params) { return cuda::segment_sums(*params, nullptr); }
int emulated_group_advantages(const GroupAdvantageParams* params) { return cuda::group_advantages(*params, nullptr); }
}
