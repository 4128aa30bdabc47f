// Runs the same work on several threads.

#pragma once

#include <system_error>
#include <thread>
#include <vector>

namespace index_builder {

// Calls `work` on up to `threads` threads, of which the calling one is one, and returns when all calls have. The work
// shares itself out: each call takes pieces until none is left, so that fewer threads (the system may refuse some) do
// the same.
template <typename Work>
void run_threads(int threads, const Work& work) {
  std::vector<std::thread> others;
  for (int number = 1; number < threads; ++number) {
    try {
      others.emplace_back(work);
    } catch (const std::system_error&) {
      break;
    }
  }
  work();
  for (std::thread& other : others) other.join();
}

}  // namespace index_builder
