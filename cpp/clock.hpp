// What the phases of a split take.
#pragma once

#include <chrono>

namespace pissa {

using Clock = std::chrono::steady_clock;

inline double seconds_since(Clock::time_point start) {
  return std::chrono::duration<double>(Clock::now() - start).count();
}

}  // namespace pissa
