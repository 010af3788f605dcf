#include "cpu.h"

#include <cstring>

#ifdef KARMA_AMX
#include <cpuid.h>
#ifdef __linux__
#include <sys/syscall.h>
#include <unistd.h>
#endif
#endif

namespace karma {

namespace {

#ifdef KARMA_AMX
bool has_amx_bfloat16() {
  unsigned a, b, c, d;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || !(d >> 22 & 1) || !(d >> 24 & 1)) return false;  // bf16, tiles
#ifdef __linux__
  // the kernel gives the 8 KB of tile registers to a process that asks
  constexpr long ask = 0x1023, tile_data = 18;
  return syscall(SYS_arch_prctl, ask, tile_data) == 0;
#else
  return false;
#endif
}
#endif

#ifdef KARMA_X86
std::vector<const Kernel*> find() {
  std::vector<const Kernel*> found;
  __builtin_cpu_init();
  const bool fused = __builtin_cpu_supports("fma") && __builtin_cpu_supports("popcnt");
  const bool avx2 = fused && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("bmi");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
#ifdef KARMA_AMX
  if (avx512 && has_amx_bfloat16()) found.push_back(&kAmxBfloat16);
#endif
  if (avx512 && __builtin_cpu_supports("avx512vnni")) found.push_back(&kAvx512Int8);
#ifdef KARMA_AVX512_BF16
  if (avx512 && __builtin_cpu_supports("avx512bf16")) found.push_back(&kAvx512Bfloat16);
#endif
  if (avx512) found.push_back(&kAvx512);
  if (avx2) found.push_back(&kAvx2);
  found.push_back(&kPortable);
  return found;
}
#else
std::vector<const Kernel*> find() { return {&kPortable}; }
#endif

}  // namespace

std::vector<const Kernel*> kernels() {
  static const std::vector<const Kernel*> found = find();
  return found;
}

const Kernel* exact_kernel() {
  static const Kernel* const found = [] {
    for (const Kernel* k : kernels())
      if (k->exact) return k;
    return static_cast<const Kernel*>(nullptr);
  }();
  return found;
}

const Kernel* kernel_named(const char* name) {
  for (const Kernel* k : kernels())
    if (std::strcmp(k->name, name) == 0) return k;
  return nullptr;
}

}  // namespace karma
