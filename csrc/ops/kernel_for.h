// Which kernels the ops have, in words, and what they keep.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <utility>
#include <vector>

namespace flash_xlstm {

constexpr int min_compute_capability = 8;  // .0

// A static object of this type, in the op's file, describes a function of flash_xlstm.ops. `words` names its CUDA
// kernels on a device of a compute capability. nullptr: "portable".
struct DescribedOp {
  DescribedOp(const char* op, std::string (*words)(int major, int minor) = nullptr);
};

// The described ops, sorted.
std::vector<std::string> described_ops();
// The kernel that an op takes on a CUDA device of this compute capability; without one, on the CPU. Throws
// std::out_of_range for an unknown op.
std::string kernel_for(const std::string& op, std::optional<std::pair<int, int>> compute_capability);

// mlstm_kept_floats for a dtype's name and a CUDA device.
int64_t mlstm_kept_floats_on(const std::string& dtype, int64_t dqk, int64_t dv, int32_t device);

}  // namespace flash_xlstm

// A function of cuda::, which a CPU-only build does not have.
#ifdef FLASH_XLSTM_WITH_CUDA
#define CUDA_ONLY(function) function
#else
#define CUDA_ONLY(function) nullptr
#endif
