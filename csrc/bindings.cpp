// The pybind11 module _C. Importing it registers the operators (ops/*.cpp). Its own functions give facts about the
// build and the operators.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <map>
#include <string>
#include <utility>
#include <vector>

#include "cpu/isa.h"
#include "ops/kernel_for.h"
#include "params/conv.h"
#include "params/linear.h"
#include "params/mlstm.h"
#include "params/pointwise.h"
#include "params/slstm.h"

namespace py = pybind11;

namespace flash_xlstm {

namespace {

// The thread's last argument error. Where torch has turned it into a RuntimeError, Python recognizes it by this.
thread_local const char* last_kind = "";
thread_local std::string last_message;

}  // namespace

// These throw pybind11's exceptions, which torch's operator calls pass on unchanged. Only this file sees pybind11.
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
      "limits",
      [] {
        return std::map<std::string, int64_t>{
            {"fused_linear_max_weights", flash_xlstm::FusedLinearRows::max_parts},
            {"linear_max_rows", flash_xlstm::linear_max_rows},
            {"linear_cuda_in_multiple", flash_xlstm::linear_in_multiple},
            {"linear_cuda_alignment", flash_xlstm::linear_alignment},
            {"product_cuda_multiple", flash_xlstm::product_multiple},
            {"product_cuda_part", flash_xlstm::product_part},
            {"product_cuda_max_parts", flash_xlstm::Product::max_parts},
            {"mlstm_max_chunk_size", flash_xlstm::max_chunk_size},
            {"mlstm_kept_tokens", flash_xlstm::mlstm_kept_tokens},
            {"mlstm_step_cuda_max_dqk", flash_xlstm::cuda::max_step_dqk},
            {"norm_cuda_max_dim", flash_xlstm::max_norm_dim},
            {"conv_max_kernel", flash_xlstm::max_conv_kernel},
            {"slstm_kept", flash_xlstm::slstm_kept},
        };
      },
      "The operators' limits; those with cuda in their name hold on CUDA only.");
  m.def(
      "few_rows",
      [](bool cuda) -> std::pair<std::vector<std::string>, int64_t> {
        static_assert(flash_xlstm::linear_cuda_dtype == flash_xlstm::DType::bfloat16);
        if (cuda) return {{"bfloat16"}, flash_xlstm::linear_max_rows};
        return {{"float32", "bfloat16", "float16"}, flash_xlstm::linear_faster_rows};
      },
      py::arg("cuda"), "The dtypes and the most rows for which linear_rows is faster than torch's product.");
  m.def(
      "mlstm_kept_states",
      [](int64_t dqk, int64_t dv) {
        const auto [floats, tokens] = flash_xlstm::cpu::mlstm_kept_states(dqk, dv);
        return std::pair(floats, tokens);
      },
      py::arg("dqk"), py::arg("dv"),
      "On CPUs: the floats of a state that a forward can keep, and at every how many tokens there is one.");
  m.def("mlstm_kept_floats", &flash_xlstm::mlstm_kept_floats_on, py::arg("dtype"), py::arg("dqk"), py::arg("dv"),
        py::arg("device"),
        "The floats of the states that a forward can keep for each chunk of mlstm_kept_tokens and head; 0: none.");
  m.def("ops", &flash_xlstm::described_ops, "The functions of flash_xlstm.ops, sorted.");
  m.def("kernel_for", &flash_xlstm::kernel_for, py::arg("op"), py::arg("compute_capability"),
        "The kernel that an op takes on a CUDA device of this compute capability; None: on the CPU.");
  m.def(
      "argument_error", [] { return py::make_tuple(flash_xlstm::last_kind, flash_xlstm::last_message); },
      "Kind and message of this thread's last argument error; empty where there was none.");
}
