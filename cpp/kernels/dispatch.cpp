#include <cstdlib>
#include <stdexcept>
#include <string>

#include "kernels/kernels.hpp"

#if defined(PISSA_X86) && defined(__linux__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace pissa {
namespace {

// Whether the CPU has AMX for bf16 and the system lets this process use it. Linux wants to be asked: the registers are
// 8 KiB that a thread's switch must save.
bool may_use_amx() {
#if defined(PISSA_X86) && defined(__linux__)
  constexpr unsigned kBf16 = 1u << 22, kTile = 1u << 24;  // of leaf 7's EDX
  constexpr int kRequestPermission = 0x1023, kTileData = 18;
  unsigned a = 0, b = 0, c = 0, d = 0;
  if (__get_cpuid_count(7, 0, &a, &b, &c, &d) == 0 || (d & kBf16) == 0 || (d & kTile) == 0) return false;
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
  return false;
#endif
}

}  // namespace

std::vector<const Kernels*> available_kernels() {
  std::vector<const Kernels*> kernels{&kPortable};
#if defined(PISSA_X86)
  // __builtin_cpu_supports also asks whether the operating system saves the registers.
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c")) {
    kernels.push_back(&kAvx2);
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
        __builtin_cpu_supports("avx512dq")) {
      kernels.push_back(&kAvx512);
      if (__builtin_cpu_supports("avx512vnni")) {
        kernels.push_back(&kAvx512Vnni);
        if (__builtin_cpu_supports("avx512bf16")) {
          kernels.push_back(&kAvx512Bf16);
          if (may_use_amx()) kernels.push_back(&kAmxBf16);
        }
      }
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
