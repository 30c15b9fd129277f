#include <torch/csrc/stable/ops.h>

#ifdef __linux__
#include <sys/mman.h>
#endif
#if defined(FLASH_XLSTM_X86_ISAS) && defined(__linux__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include <cstdlib>
#include <stdexcept>
#include <string>

#include "cpu/isa.h"
#include "cpu/vector_kernels.h"

namespace flash_xlstm::cpu {

#define DECLARE_ISA(isa)                     \
  namespace isa {                            \
  extern const VectorKernels vector_kernels; \
  }
DECLARE_ISA(baseline)
#ifdef FLASH_XLSTM_X86_ISAS
DECLARE_ISA(avx2)
DECLARE_ISA(avx512)
#endif

namespace {

struct Choice {
  Isa isa;
  const VectorKernels* kernels;
  const char* name;
  bool bf16 = false, amx = false;
};

// Whether the processor has AVX512-BF16.
bool bf16_there() {
#if defined(FLASH_XLSTM_X86_ISAS) && defined(__linux__)
  constexpr unsigned avx512_bf16 = 1u << 5;
  unsigned a = 0, b = 0, c = 0, d = 0;
  return __get_cpuid_count(7, 1, &a, &b, &c, &d) != 0 && (a & avx512_bf16) != 0;
#else
  return false;
#endif
}
// Whether the processor has AMX tiles for bfloat16, and the kernel grants them to this process.
bool amx_granted() {
#if defined(FLASH_XLSTM_EMULATE_AMX)
  return true;
#elif defined(FLASH_XLSTM_X86_ISAS) && defined(__linux__)
  constexpr unsigned bf16_tiles = 1u << 22, tiles = 1u << 24;
  constexpr int request_permission = 0x1023, tile_data = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  unsigned a = 0, b = 0, c = 0, d = 0;
  if (__get_cpuid_count(7, 0, &a, &b, &c, &d) == 0 || (d & bf16_tiles) == 0 || (d & tiles) == 0) return false;
  return syscall(SYS_arch_prctl, request_permission, tile_data) == 0;
#else
  return false;
#endif
}

// The best instruction set of the processor, but at most the one that FLASH_XLSTM_CPU_ISA names. So one machine can
// test them all.
Choice choose() {
  const char* value = std::getenv("FLASH_XLSTM_CPU_ISA");
  const std::string limit = value != nullptr && *value != '\0' ? value : "amx";
  const bool wants_bf16 = limit == "avx512_bf16" || limit == "amx", wants_avx512 = limit == "avx512" || wants_bf16;
  if (limit != "baseline" && limit != "avx2" && !wants_avx512) {
    throw std::invalid_argument("FLASH_XLSTM_CPU_ISA is '" + limit +
                                "'; it must be baseline, avx2, avx512, avx512_bf16 or amx");
  }
#ifdef FLASH_XLSTM_X86_ISAS
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("fma") && wants_avx512) {
    if (wants_bf16 && bf16_there()) {
      if (limit == "amx" && amx_granted()) return {Isa::avx512, &avx512::vector_kernels, "AVX-512 and AMX", true, true};
      return {Isa::avx512, &avx512::vector_kernels, "AVX-512 and BF16", true};
    }
    return {Isa::avx512, &avx512::vector_kernels, "AVX-512"};
  }
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && limit != "baseline") {
    return {Isa::avx2, &avx2::vector_kernels, "AVX2"};
  }
#endif
  return {Isa::baseline, &baseline::vector_kernels, "baseline"};
}

const Choice& choice() {
  static const Choice chosen = choose();
  return chosen;
}

}  // namespace

const VectorKernels& vector_kernels() { return *choice().kernels; }
Isa isa() { return choice().isa; }
bool has_bf16() { return choice().bf16; }
bool has_amx() { return choice().amx; }
const char* isa_name() { return choice().name; }

void parallel_for(int64_t begin, int64_t end, int64_t grain, void (*run)(const void* f, int64_t begin, int64_t end),
                  const void* f) {
  torch::stable::parallel_for(begin, end, grain, [&](int64_t from, int64_t to) { run(f, from, to); });
}

void wants_huge_pages([[maybe_unused]] void* data, [[maybe_unused]] int64_t bytes) {
#ifdef __linux__
  constexpr uintptr_t huge = uintptr_t{1} << 21;
  const uintptr_t begin = reinterpret_cast<uintptr_t>(data), end = (begin + bytes) & ~(huge - 1);
  const uintptr_t first = (begin + huge - 1) & ~(huge - 1);
  if (first + huge < end) madvise(reinterpret_cast<void*>(first), end - first, MADV_HUGEPAGE);  // may be refused
#endif
}

int64_t thread_count() { return torch::stable::get_num_threads(); }

}  // namespace flash_xlstm::cpu
