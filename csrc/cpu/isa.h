// Code that is compiled once for each instruction set (cmake/cpu_isa.cmake) and chosen at run time.
#pragma once

#include <cstdint>

namespace flash_xlstm::cpu {

enum class Isa { baseline, avx2, avx512 };

// The best instruction set of this machine, but at most the one that FLASH_XLSTM_CPU_ISA names. Whether products of
// bfloat16 matrices may use AVX512-BF16 besides, and AMX tiles (amx.h). And their name: "AVX-512 and AMX", "AVX-512 and
// BF16", "AVX-512", "AVX2" or "baseline".
Isa isa();
bool has_bf16();
bool has_amx();
const char* isa_name();

// torch's parallel_for, for code that may not include its headers.
void parallel_for(int64_t begin, int64_t end, int64_t grain, void (*run)(const void* f, int64_t begin, int64_t end),
                  const void* f);
// torch's number of threads.
int64_t thread_count();

// Asks for huge pages in a large array that has not been written yet: its page faults take as long as a kernel.
void wants_huge_pages(void* data, int64_t bytes);

}  // namespace flash_xlstm::cpu

#ifdef FLASH_XLSTM_ISA
// Begins the definition of the kernel cpu::name(const Params& p), in the namespace of the instruction set. The
// baseline's copy of the file also defines cpu::name, which calls the kernel of this machine's instruction set.
#ifndef FLASH_XLSTM_ISA_CHOOSES
#define CPU_KERNEL(name, Params) void name(const Params& p)
#else
#ifdef FLASH_XLSTM_X86_ISAS
#define DECLARE_FOR_ISAS(name, Params) \
  namespace flash_xlstm::cpu::avx2 {   \
  void name(const Params& p);          \
  }                                    \
  namespace flash_xlstm::cpu::avx512 { \
  void name(const Params& p);          \
  }
#define CALL_FOR_ISA(name)                          \
  if (isa() == Isa::avx512) return avx512::name(p); \
  if (isa() == Isa::avx2) return avx2::name(p);
#else
#define DECLARE_FOR_ISAS(name, Params)
#define CALL_FOR_ISA(name)
#endif
#define CPU_KERNEL(name, Params)                \
  void name(const Params& p);                   \
  }                                             \
  DECLARE_FOR_ISAS(name, Params)                \
  namespace flash_xlstm::cpu {                  \
  void name(const Params& p) {                  \
    CALL_FOR_ISA(name)                          \
    return FLASH_XLSTM_ISA::name(p);            \
  }                                             \
  }                                             \
  namespace flash_xlstm::cpu::FLASH_XLSTM_ISA { \
  void name(const Params& p)
#endif
#endif
