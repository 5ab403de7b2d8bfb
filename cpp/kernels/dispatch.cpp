#include <cstdlib>
#include <stdexcept>
#include <string>

#include "kernels/kernels.hpp"

namespace pissa {

std::vector<const Kernels*> available_kernels() {
  std::vector<const Kernels*> kernels{&kPortable};
#if defined(PISSA_X86)
  // __builtin_cpu_supports also asks whether the operating system saves the registers.
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c")) {
    kernels.push_back(&kAvx2);
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
        __builtin_cpu_supports("avx512dq")) {
      kernels.push_back(&kAvx512);
      if (__builtin_cpu_supports("avx512bf16")) kernels.push_back(&kAvx512Bf16);
    }
  }
#endif
  return kernels;
}

const Kernels& select_kernels() {
  const auto kernels = available_kernels();
  const char* forced = std::getenv("PISSA_CONVERT_KERNEL");
  if (forced == nullptr || *forced == '\0') return *kernels.back();
  std::string names;
  for (const Kernels* candidate : kernels) {
    if (std::string(forced) == candidate->name) return *candidate;
    names += (names.empty() ? "" : ", ") + std::string(candidate->name);
  }
  throw std::invalid_argument("PISSA_CONVERT_KERNEL is '" + std::string(forced) + "': this CPU has " + names);
}

}  // namespace pissa
