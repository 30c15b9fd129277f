// The pybind11 module _C. Importing it registers the operators (ops/library.cpp); what it offers itself is facts
// about the build.
#include <pybind11/pybind11.h>

#include <string>

#include "cpu/vector_kernels.h"

namespace py = pybind11;

namespace flash_xlstm {

// Here because pybind11 lives here: torch's operator call turns it into a Python TypeError.
[[noreturn]] void throw_type_error(const std::string& message) { throw py::type_error(message); }

}  // namespace flash_xlstm

PYBIND11_MODULE(_C, m) {
  m.doc() = "flash-xlstm's compiled core";
  m.def(
      "build_info",
      [] {
        py::dict info;
        info["version"] = FLASH_XLSTM_VERSION;
        info["commit"] = FLASH_XLSTM_COMMIT;
        info["cuda"] = FLASH_XLSTM_CUDA_VERSION;
        info["architectures"] = FLASH_XLSTM_ARCHS;
        info["compiler"] = FLASH_XLSTM_COMPILER;
        info["cpu_isa"] = flash_xlstm::cpu::isa_name();
        info["torch_built"] = FLASH_XLSTM_TORCH_BUILT;
        return info;
      },
      "Facts about this build, as strings; empty where there is none.");
}
