// One token of the mLSTM on the CPU. A task takes one row and head and reads and writes its state once.
#include <torch/csrc/stable/ops.h>

#include <cstring>
#include <vector>

#include "cpu/vector_kernels.h"
#include "params/mlstm.h"

namespace flash_xlstm::cpu {

void mlstm_step(const MlstmStep& p) {
  const VectorKernels& kernels = vector_kernels();
  const int64_t h_bytes = p.dv * element_bytes(p.dtype);
  // At least 16k state elements a thread: with fewer, waking a thread costs more than it saves.
  const int64_t grain = 1 + (int64_t{1} << 14) / (p.dqk * p.dv);
  torch::stable::parallel_for(0, p.batch * p.heads, grain, [&](int64_t begin, int64_t end) {
    std::vector<float> scratch(2 * (p.dqk + p.dv));
    for (int64_t item = begin; item < end; ++item) {
      const int64_t row = item / p.heads, head = item % p.heads;
      const int64_t slot = p.state.indices == nullptr ? row : p.state.indices[row];
      if (slot < 0) {
        std::memset(static_cast<char*>(p.h) + item * h_bytes, 0, h_bytes);
      } else {
        kernels.step(p, row, head, slot, scratch.data());
      }
    }
  });
}

}  // namespace flash_xlstm::cpu
