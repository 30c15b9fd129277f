#include <cstdlib>
#include <cstring>

#include "cpu/vector_kernels.h"

namespace flash_xlstm::cpu {

#define DECLARE_ISA(isa)                    \
  namespace isa {                           \
  extern const VectorKernels vector_kernels; \
  }
DECLARE_ISA(baseline)
#ifdef FLASH_XLSTM_X86_ISAS
DECLARE_ISA(avx2)
DECLARE_ISA(avx512)
#endif

namespace {

struct Choice {
  const VectorKernels* kernels;
  const char* name;
};

// The best that the processor has; at most what FLASH_XLSTM_CPU_ISA names (baseline, avx2), so that one machine can test
// what others run.
Choice choose() {
#ifdef FLASH_XLSTM_X86_ISAS
  const char* limit = std::getenv("FLASH_XLSTM_CPU_ISA");
  const auto limited_to = [&](const char* name) { return limit != nullptr && std::strcmp(limit, name) == 0; };
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("fma") && !limited_to("avx2") &&
      !limited_to("baseline")) {
    return {&avx512::vector_kernels, "AVX-512"};
  }
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && !limited_to("baseline")) {
    return {&avx2::vector_kernels, "AVX2"};
  }
#endif
  return {&baseline::vector_kernels, "baseline"};
}

const Choice& choice() {
  static const Choice chosen = choose();
  return chosen;
}

}  // namespace

const VectorKernels& vector_kernels() { return *choice().kernels; }
const char* isa_name() { return choice().name; }

}  // namespace flash_xlstm::cpu
