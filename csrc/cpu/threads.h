// A parallel-for that starts threads for each call, for programs without a thread pool.
#pragma once

#include <algorithm>
#include <cstdint>
#include <exception>
#include <thread>
#include <vector>

#include "kernels.h"

namespace obc::cpu {

// ParallelFor::run on at most `count` threads, including this one. If the system refuses another thread, or memory for
// it, the remaining tasks run in this one: sums do not depend on the thread that computes them.
inline void run_in_threads(int64_t count, int64_t tasks, int64_t grain, ParallelFor::Body body, const void* context) {
  const int64_t ranges = std::max<int64_t>(1, std::min(count, (tasks + grain - 1) / grain));
  const int64_t length = (tasks + ranges - 1) / ranges;
  std::vector<std::thread> threads;
  threads.reserve(ranges - 1);
  int64_t begin = length;
  try {
    for (; begin < tasks; begin += length) {
      threads.emplace_back(body, begin, std::min(begin + length, tasks), context);
    }
  } catch (const std::exception&) {
    body(begin, tasks, context);
  }
  body(0, std::min(length, tasks), context);
  for (std::thread& thread : threads) thread.join();
}

}  // namespace obc::cpu
