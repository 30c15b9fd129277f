#include <torch/csrc/stable/ops.h>

#include <vector>

#include "cpu/kernels.h"
#include "cpu/vector_kernels.h"

namespace flash_xlstm::cpu {

void linear_rows(const LinearRows& p) {
  const VectorKernels& kernels = vector_kernels();
  std::vector<float> x(p.rows * p.in);
  kernels.pack(x.data(), p.x, p.dtype, p.x_stride, p.rows, p.in, p.rows);
  // At least 64k weights a thread, and whole groups of four columns; which thread has a column changes no result.
  const int64_t grain = (1 + (int64_t{1} << 16) / p.in + 3) / 4;
  torch::stable::parallel_for(0, (p.out + 3) / 4, grain, [&](int64_t begin, int64_t end) {
    kernels.linear_rows(p, x.data(), begin * 4, end * 4 < p.out ? end * 4 : p.out);
  });
}

}  // namespace flash_xlstm::cpu
