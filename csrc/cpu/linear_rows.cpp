#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <vector>

#include "cpu/vector_kernels.h"
#include "params/linear.h"

namespace flash_xlstm::cpu {

void linear_rows(const LinearRows* products, int64_t count) {
  const VectorKernels& kernels = vector_kernels();
  const LinearRows& first = products[0];
  std::vector<float> x(first.rows * first.in);
  kernels.linear_rows_x(first, x.data());
  // Groups of four columns, product after product. A result does not depend on the thread that makes it.
  const auto groups = [](const LinearRows& p) { return ceil_div(p.out, 4); };
  int64_t total = 0;
  for (int64_t i = 0; i < count; ++i) total += groups(products[i]);
  const int64_t grain = (1 + (int64_t{1} << 16) / first.in + 3) / 4;  // at least 64k weights a thread
  torch::stable::parallel_for(0, total, grain, [&](int64_t begin, int64_t end) {
    for (int64_t i = 0; i < count; ++i) {
      const LinearRows& p = products[i];
      const int64_t from = std::max<int64_t>(begin, 0), to = std::min(end, groups(p));
      if (from < to) kernels.linear_rows(p, x.data(), from * 4, std::min(to * 4, p.out));
      begin -= groups(p);
      end -= groups(p);
    }
  });
}

}  // namespace flash_xlstm::cpu
