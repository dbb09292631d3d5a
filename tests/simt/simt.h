// CUDA kernels on the host: every thread of a thread block is a fiber, and runs until its next
// barrier. Thread blocks come one after the other. Threads and blocks run in order or in reverse:
// a barrier that is missing shows in one of the two, though it may pass in the other.
//
// What it has is what our kernels use: thread and block indices, static shared memory and
// __syncthreads. It does not model the memory of a GPU, nor other interleavings.
#pragma once

#include <ucontext.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <memory>
#include <set>
#include <vector>

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

namespace simt {

constexpr int kFinished = 0;  // a fiber stands at the line of a barrier, or here
constexpr size_t kStackBytes = 1 << 16;

struct Fiber {
  ucontext_t context;
  std::unique_ptr<char[]> stack{new char[kStackBytes]};
  dim3 thread;
  int line;
};

inline bool reversed = false;
inline int dropped_line = -1;     // a barrier that nobody waits at
inline std::set<int> lines_seen;  // of barriers
inline dim3 grid, block, block_index;
inline std::vector<Fiber> fibers;
inline Fiber* running;
inline ucontext_t scheduler;
inline const std::function<void()>* body;

inline void fail(const char* message) {
  std::fprintf(stderr, "simt: %s\n", message);
  std::exit(1);
}

inline void barrier(int line) {
  lines_seen.insert(line);
  if (line == dropped_line) return;
  running->line = line;
  swapcontext(&running->context, &scheduler);
}

inline void run_fiber() {
  (*body)();
  running->line = kFinished;
}

inline void run_block() {
  const unsigned count = block.x * block.y * block.z;
  if (fibers.size() < count) fibers.resize(count);
  for (unsigned i = 0; i < count; ++i) {
    Fiber& fiber = fibers[i];
    fiber.thread = dim3(i % block.x, i / block.x % block.y, i / block.x / block.y);
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = fiber.stack.get();
    fiber.context.uc_stack.ss_size = kStackBytes;
    fiber.context.uc_link = &scheduler;
    makecontext(&fiber.context, run_fiber, 0);
  }
  int line;
  do {
    for (unsigned i = 0; i < count; ++i) {
      running = &fibers[reversed ? count - 1 - i : i];
      swapcontext(&scheduler, &running->context);
    }
    line = fibers[0].line;
    for (unsigned i = 0; i < count; ++i) {
      if (fibers[i].line != line) fail("threads of one block wait at different barriers");
    }
  } while (line != kFinished);
}

inline void run_grid(dim3 grid_size, dim3 block_size, const std::function<void()>& kernel) {
  if (block_size.x * block_size.y * block_size.z > 1024) fail("a block of more than 1024 threads");
  if (grid_size.x * grid_size.y * grid_size.z == 0) fail("an empty grid");
  grid = grid_size;
  block = block_size;
  body = &kernel;
  const uint64_t count = uint64_t{grid.x} * grid.y * grid.z;
  for (uint64_t i = 0; i < count; ++i) {
    const uint64_t at = reversed ? count - 1 - i : i;
    block_index = dim3(at % grid.x, at / grid.x % grid.y, at / grid.x / grid.y);
    run_block();
  }
}

// Launches a kernel as the CUDA files' own launchers do.
struct Launch {
  template <typename... Parameters, typename... Arguments>
  void operator()(const char*, void (*kernel)(Parameters...), dim3 grid_size, dim3 block_size,
                  Arguments... arguments) const {
    run_grid(grid_size, block_size, [&] { kernel(arguments...); });
  }
};

}  // namespace simt

#define __global__
#define __device__
#define __host__
#define __shared__ static
#define threadIdx (simt::running->thread)
#define blockIdx (simt::block_index)
#define blockDim (simt::block)
#define gridDim (simt::grid)
#define __syncthreads() simt::barrier(__LINE__)
