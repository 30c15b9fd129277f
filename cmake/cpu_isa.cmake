# The CPU kernels' inner loops, compiled once for each instruction set and chosen at run time (cpu/isa.cpp), so that one
# binary serves every machine and uses what it has.
function(add_isa_kernels target)
  set(isas baseline)
  set(flags_baseline "")
  set(chooses_baseline "#define FLASH_XLSTM_ISA_CHOOSES\n")
  if(CMAKE_SYSTEM_PROCESSOR MATCHES "^(x86_64|AMD64)$")
    list(APPEND isas avx2 avx512)
    set(flags_avx2 -mavx2 -mfma -mf16c -mbmi2)
    set(flags_avx512 -mavx512f -mavx512bw -mavx512dq -mavx512vl -mavx2 -mfma -mf16c -mbmi2 -mprefer-vector-width=512)
    target_compile_definitions(${target} PRIVATE FLASH_XLSTM_X86_ISAS)
  endif()
  if("avx512" IN_LIST isas)
    set_property(SOURCE csrc/cpu/amx.cpp APPEND PROPERTY COMPILE_OPTIONS
      ${flags_avx512} -mavx512bf16 -mamx-tile -mamx-bf16)
  endif()
  foreach(isa ${isas})
    set(source ${CMAKE_CURRENT_BINARY_DIR}/vector_kernels_${isa}.cpp)
    file(CONFIGURE OUTPUT ${source} CONTENT
      "#define FLASH_XLSTM_ISA ${isa}\n${chooses_${isa}}#include \"cpu/vector_kernels.inl\"\n" @ONLY)
    set_property(SOURCE ${source} APPEND PROPERTY COMPILE_OPTIONS
      ${flags_${isa}} -fno-math-errno -fno-trapping-math -ffp-contract=fast)
    target_sources(${target} PRIVATE ${source})
  endforeach()
endfunction()
