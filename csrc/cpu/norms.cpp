// RMSNorm and the gated head-wise LayerNorm on the CPU, rows side by side. The weights' gradients are summed in a
// number of parts that depends on the number of rows only, so that they do not depend on the number of threads.
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cstring>
#include <vector>

#include "cpu/kernels.h"
#include "cpu/vector_kernels.h"

namespace flash_xlstm::cpu {
namespace {

// At least 16k elements a thread: below that, waking a thread costs more than it brings.
int64_t grain(int64_t row_elements) { return 1 + (int64_t{1} << 14) / row_elements; }

void store_weight(void* to, DType dtype, const float* from, int64_t count) {
  vector_kernels().unpack(to, dtype, count, from, nullptr, 1, count);
}

// Calls run(begin, end, dweight) for parts of the rows, and adds up what they put into their dweight.
template <typename F>
void in_parts(int64_t rows, int64_t columns, void* dweight, DType dtype, F&& run) {
  constexpr int64_t max_parts = 64;
  const int64_t each = std::max<int64_t>((rows + max_parts - 1) / max_parts, grain(columns));
  const int64_t parts = (rows + each - 1) / each;
  std::vector<float> sums(dweight == nullptr ? 0 : (parts + 1) * columns);
  torch::stable::parallel_for(0, parts, 1, [&](int64_t begin, int64_t end) {
    for (int64_t part = begin; part < end; ++part) {
      run(part * each, std::min(rows, (part + 1) * each), dweight == nullptr ? nullptr : sums.data() + part * columns);
    }
  });
  if (dweight == nullptr) return;
  float* total = sums.data() + parts * columns;
  for (int64_t part = 0; part < parts; ++part) {
    for (int64_t c = 0; c < columns; ++c) total[c] += sums[part * columns + c];
  }
  store_weight(dweight, dtype, total, columns);
}

}  // namespace

void rms_norm(const RmsNorm& p) {
  torch::stable::parallel_for(0, p.rows, grain(p.dim), [&](int64_t begin, int64_t end) {
    std::vector<float> scratch(2 * p.dim);
    vector_kernels().rms_norm(p, begin, end, scratch.data());
  });
}

void rms_norm_backward(const RmsNormBackward& p) {
  in_parts(p.rows, p.dim, p.dweight, p.weight_dtype, [&](int64_t begin, int64_t end, float* dweight) {
    std::vector<float> scratch(3 * p.dim);
    vector_kernels().rms_norm_backward(p, begin, end, dweight, scratch.data());
  });
}

void gated_head_norm(const GatedHeadNorm& p) {
  torch::stable::parallel_for(0, p.tokens, grain(p.heads * p.dim), [&](int64_t begin, int64_t end) {
    std::vector<float> scratch(3 * p.dim);
    vector_kernels().gated_head_norm(p, begin, end, scratch.data());
  });
}

void gated_head_norm_backward(const GatedHeadNormBackward& b) {
  const int64_t columns = b.p.heads * b.p.dim;
  in_parts(b.p.tokens, columns, b.dweight, b.p.weight_dtype, [&](int64_t begin, int64_t end, float* dweight) {
    std::vector<float> scratch(4 * b.p.dim);
    vector_kernels().gated_head_norm_backward(b, begin, end, dweight, scratch.data());
  });
}

}  // namespace flash_xlstm::cpu
