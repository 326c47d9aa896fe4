// The scheduler of the emulation, and the few symbols of torch's CUDA library that csrc/torch_cuda.cpp needs.

#include <ucontext.h>

#include <csetjmp>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <vector>

#include "cuda_runtime.h"

dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace emulation {

namespace {

constexpr unsigned kWarp = 32;
constexpr size_t kStack = 128 * 1024;  // a kernel's parameters alone may be 32 KiB

// Threads that meet and exchange: a warp or a block. What was handed in at a meeting stays readable until the meeting
// after the next one, which nobody reaches before all have read.
struct Meeting {
  unsigned members = 0;
  unsigned arrived = 0;
  unsigned ended = 0;
  uint64_t number = 0;
  uint64_t slots[2][kWarp] = {};
  int sums[2] = {};
};

struct Fiber {
  unsigned thread = 0;
  unsigned index_of_block = 0;
  Meeting* warp = nullptr;
  Meeting* block = nullptr;
  bool ended = false;
  bool started = false;
  ucontext_t entry;
  jmp_buf resume;
  std::unique_ptr<char[]> stack;
};

enum Order { kForward, kBackward, kInterleaved };

int order = kForward;
int capture = 0;
int64_t launches = 0;
uint64_t progress = 0;  // goes up whenever a thread gets on; a round without it is a deadlock
const std::function<void()>* body_of_launch = nullptr;
jmp_buf scheduler;
Fiber* running = nullptr;

[[noreturn]] void fail(const char* what) {
  std::fprintf(stderr, "CUDA emulation: %s (block %u)\n", what, running->index_of_block);
  std::abort();
}

void main_of_fiber() {
  (*body_of_launch)();
  running->ended = true;
  running->warp->ended += 1;
  running->block->ended += 1;
  progress += 1;
  _longjmp(scheduler, 1);
}

void step(Fiber& fiber) {
  running = &fiber;
  threadIdx.x = fiber.thread;
  blockIdx.x = fiber.index_of_block;
  if (_setjmp(scheduler) != 0) return;
  if (fiber.started) _longjmp(fiber.resume, 1);
  fiber.started = true;
  getcontext(&fiber.entry);
  fiber.entry.uc_stack.ss_sp = fiber.stack.get();
  fiber.entry.uc_stack.ss_size = kStack;
  fiber.entry.uc_link = nullptr;
  makecontext(&fiber.entry, main_of_fiber, 0);
  setcontext(&fiber.entry);
}

void meet(Meeting& meeting) {
  const uint64_t number = meeting.number;
  progress += 1;
  meeting.arrived += 1;
  if (meeting.arrived == meeting.members) {
    meeting.arrived = 0;
    meeting.sums[(number + 1) % 2] = 0;
    meeting.number += 1;
    return;
  }
  while (meeting.number == number) {
    if (meeting.ended > 0) fail("threads wait at a barrier or shuffle that others never reach");
    pause();
  }
}

void run_blocks(unsigned first, unsigned count, unsigned threads, std::vector<Fiber>& fibers) {
  std::vector<Meeting> of_blocks(count), of_warps(count * ((threads + kWarp - 1) / kWarp));
  fibers.resize(count * threads);
  for (unsigned b = 0; b < count; ++b) {
    of_blocks[b].members = threads;
    for (unsigned t = 0; t < threads; ++t) {
      Fiber& fiber = fibers[b * threads + t];
      fiber.thread = t;
      fiber.index_of_block = first + b;
      fiber.block = &of_blocks[b];
      fiber.warp = &of_warps[b * ((threads + kWarp - 1) / kWarp) + t / kWarp];
      fiber.warp->members += 1;
      fiber.ended = fiber.started = false;
      if (!fiber.stack) fiber.stack.reset(new char[kStack]);
    }
  }
  const size_t all = fibers.size();
  for (size_t left = all; left > 0;) {
    const uint64_t before = progress;
    for (size_t i = 0; i < all; ++i) {
      // 7 is prime to every power of two.
      const size_t at = order == kForward ? i : order == kBackward ? all - 1 - i : i * 7 % all;
      if (fibers[at].ended) continue;
      step(fibers[at]);
      left -= fibers[at].ended;
    }
    if (progress == before) fail("no thread gets on: a deadlock");
  }
}

}  // namespace

void pause() {
  if (_setjmp(running->resume) == 0) _longjmp(scheduler, 1);
}

bool capturing() { return capture != 0; }

int64_t vector_loads = 0;
int64_t memsets = 0;

void run(unsigned blocks, unsigned threads, bool cooperative, const std::function<void()>& body) {
  static std::vector<Fiber> fibers;
  launches += 1;
  body_of_launch = &body;
  gridDim.x = blocks;
  blockDim.x = threads;
  const unsigned at_once = cooperative ? blocks : 1;
  for (unsigned first = 0; first < blocks; first += at_once) {
    // Which block is the last of several must not matter either.
    const unsigned block = order == kBackward && !cooperative ? blocks - 1 - first : first;
    run_blocks(block, at_once, threads, fibers);
  }
}

int barrier(int value) {
  Meeting& block = *running->block;
  int& sum = block.sums[block.number % 2];
  sum += value;
  meet(block);
  return sum;
}

const uint64_t* exchange(uint64_t value) {
  Meeting& warp = *running->warp;
  if (warp.members != kWarp) fail("a shuffle in an incomplete warp");
  uint64_t* const slots = warp.slots[warp.number % 2];
  slots[running->thread % kWarp] = value;
  meet(warp);
  return slots;
}

}  // namespace emulation

extern "C" {

__attribute__((visibility("default"))) void obc_emulation_order(int order) { emulation::order = order; }
__attribute__((visibility("default"))) void obc_emulation_capture(int capturing) { emulation::capture = capturing; }
__attribute__((visibility("default"))) int64_t obc_emulation_launches() { return emulation::launches; }

__attribute__((visibility("default"))) int64_t obc_emulation_vector_loads() { return emulation::vector_loads; }

__attribute__((visibility("default"))) int64_t obc_emulation_memsets() { return emulation::memsets; }

// What libtorch_cuda.so gives csrc/torch_cuda.cpp on a machine with a GPU.
int32_t aoti_torch_get_current_cuda_stream(int32_t, void** stream) {
  *stream = nullptr;
  return 0;
}
int32_t aoti_torch_create_device_guard(int32_t, void** guard) {
  *guard = nullptr;
  return 0;
}
int32_t aoti_torch_delete_device_guard(void*) { return 0; }
void torch_c10_cuda_check_msg(int32_t, const char*, const char*, uint32_t, bool, char** message) { *message = nullptr; }
void torch_c10_cuda_free_error_msg(char*) {}
}
