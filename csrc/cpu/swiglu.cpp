#include <torch/csrc/stable/ops.h>

#include <algorithm>

#include "cpu/kernels.h"
#include "cpu/vector_kernels.h"

namespace flash_xlstm::cpu {

void swiglu(const Swiglu& p) {
  constexpr int64_t piece = 1 << 13, grain = 2;
  const int64_t pieces = (p.columns + piece - 1) / piece;
  torch::stable::parallel_for(0, p.rows * pieces, grain, [&](int64_t begin, int64_t end) {
    for (int64_t item = begin; item < end; ++item) {
      const int64_t column = item % pieces * piece;
      vector_kernels().swiglu(p, item / pieces, column, std::min(p.columns, column + piece));
    }
  });
}

}  // namespace flash_xlstm::cpu
