#include "ops/kernel_for.h"

#include <map>

#include "cpu/isa.h"

namespace flash_xlstm {
namespace {

using Words = std::string (*)(int major, int minor);

std::map<std::string, Words>& all_words() {
  static std::map<std::string, Words> all;
  return all;
}

}  // namespace

DescribedOp::DescribedOp(const char* op, Words words) { all_words()[op] = words; }

std::vector<std::string> described_ops() {
  std::vector<std::string> names;
  for (const auto& [name, words] : all_words()) names.push_back(name);
  return names;
}

std::string kernel_for(const std::string& op, std::optional<std::pair<int, int>> compute_capability) {
  [[maybe_unused]] const Words words = all_words().at(op);
  if (!compute_capability) return std::string("CPU, ") + cpu::isa_name();
#ifdef FLASH_XLSTM_WITH_CUDA
  const auto [major, minor] = *compute_capability;
  if (major < min_compute_capability) return "none: the CUDA kernels need compute capability 8.0 or later";
  return "CUDA, " + (words == nullptr ? std::string("portable") : words(major, minor));
#else
  return "none: built without CUDA kernels";
#endif
}

}  // namespace flash_xlstm
