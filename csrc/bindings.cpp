// The pybind11 module _C. Importing it registers the operators (ops/library.cpp); what it offers itself is facts
// about the build.
#include <pybind11/pybind11.h>

#include <string>

#include "cpu/isa.h"

namespace py = pybind11;

namespace flash_xlstm {

namespace {

// The thread's last argument error, for Python to know it by where torch has made a RuntimeError of it.
thread_local const char* last_kind = "";
thread_local std::string last_message;

}  // namespace

// Here because pybind11 lives here, whose exceptions torch's operator call hands on as what they are.
[[noreturn]] void throw_value_error(const std::string& message) {
  last_kind = "ValueError", last_message = message;
  throw py::value_error(message);
}
[[noreturn]] void throw_type_error(const std::string& message) {
  last_kind = "TypeError", last_message = message;
  throw py::type_error(message);
}

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
  m.def(
      "argument_error", [] { return py::make_tuple(flash_xlstm::last_kind, flash_xlstm::last_message); },
      "Kind and message of this thread's last argument error; empty where there was none.");
}
