// Which kernels the ops have, in words.
#pragma once

#include <optional>
#include <string>
#include <utility>
#include <vector>

namespace flash_xlstm {

constexpr int min_compute_capability = 8;  // .0

// An op's file says so of each function of flash_xlstm.ops, by a static object: `words` gives its CUDA kernels on a
// device of a compute capability; nullptr: "portable".
struct DescribedOp {
  DescribedOp(const char* op, std::string (*words)(int major, int minor) = nullptr);
};

// Those ops, sorted.
std::vector<std::string> described_ops();
// The kernel that an op takes on a CUDA device of this compute capability, or without one on the CPU. Throws
// std::out_of_range for an unknown op.
std::string kernel_for(const std::string& op, std::optional<std::pair<int, int>> compute_capability);

}  // namespace flash_xlstm

// A function of cuda::, which a CPU-only build does not have.
#ifdef FLASH_XLSTM_WITH_CUDA
#define CUDA_ONLY(function) function
#else
#define CUDA_ONLY(function) nullptr
#endif
