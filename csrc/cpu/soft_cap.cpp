#include <torch/csrc/stable/ops.h>

#include "cpu/kernels.h"
#include "cpu/vector_kernels.h"

namespace flash_xlstm::cpu {

void soft_cap(const SoftCap& p) {
  constexpr int64_t grain = 1 << 14;
  torch::stable::parallel_for(0, p.count, grain,
                              [&](int64_t begin, int64_t end) { vector_kernels().soft_cap(p, begin, end); });
}

}  // namespace flash_xlstm::cpu
