// A whole mLSTM block on one token of each row, on the CPU: the kernels of its parts one after the other, each rounding
// as its own operator does. One call, for a model so small that a token is mostly calls.
#include <vector>

#include "cpu/kernels.h"
#include "cpu/vector_kernels.h"
#include "ops/mlstm_step.h"
#include "ops/ops.h"

namespace flash_xlstm {
namespace {

// What one of several layers with the same input puts out: rows `stride` elements apart.
struct Part {
  char* data;
  int64_t stride;
};

// The rows of a token on their way through a block.
class Rows {
 public:
  explicit Rows(const Tensor& x) : x_(x), dtype_(to_dtype(x.scalar_type())), rows_(x.numel() / x.size(x.dim() - 1)) {}

  DType dtype() const { return dtype_; }
  int64_t rows() const { return rows_; }
  int64_t item() const { return dtype_ == DType::float32 ? 4 : 2; }

  char* buffer(int64_t columns) {
    buffers_.emplace_back(rows_ * columns * item());
    return buffers_.back().data();
  }

  const void* parameter(const char* name, const Tensor& t, const std::vector<int64_t>& sizes) const {
    check_shape(name, t, sizes, sizes.size() == 2 ? "(out, in)" : "(features,)");
    check_dtype(name, t, x_.scalar_type(), ", as x");
    check_device(name, t, x_, "x");
    if (!t.is_contiguous()) value_error(name, " must be contiguous");
    return t.data_ptr();
  }

  // x (rows, in) times the weights of layers with `sizes` outputs, which are stacked in one or apart; adds what there
  // is to do to `products`.
  std::vector<Part> project(std::vector<LinearRows>& products, const char* name, const void* x, int64_t in,
                            const std::vector<Tensor>& weights, const std::vector<Tensor>& biases,
                            const std::vector<int64_t>& sizes) {
    const bool stacked = weights.size() == 1;
    if (!stacked && weights.size() != sizes.size()) {
      value_error(name, " has ", static_cast<int64_t>(weights.size()), " weights; it must have 1 or ",
                  static_cast<int64_t>(sizes.size()));
    }
    if (!biases.empty() && biases.size() != weights.size()) value_error(name, " must have a bias for each weight");
    int64_t total = 0;
    for (int64_t size : sizes) total += size;
    std::vector<Part> parts;
    for (size_t w = 0; w < weights.size(); ++w) {
      const int64_t out = stacked ? total : sizes[w];
      char* y = buffer(out);
      products.push_back({dtype_, rows_, in, out, x, in, parameter(name, weights[w], {out, in}),
                          biases.empty() ? nullptr : parameter(name, biases[w], {out}), y});
      if (!stacked) parts.push_back({y, out});
      for (int64_t offset = 0, part = 0; stacked && offset < total; offset += sizes[part++]) {
        parts.push_back({y + offset * item(), total});
      }
    }
    return parts;
  }

  char* norm(const void* x, const void* residual, void* sum, const Tensor& weight, int64_t size, double eps) {
    char* y = buffer(size);
    cpu::rms_norm({dtype_, dtype_, rows_, size, static_cast<float>(eps), x, residual,
                   parameter("norm", weight, {size}), y, sum});
    return y;
  }

  char* linear(const char* name, const void* x, int64_t in, const Tensor& weight, int64_t out) {
    std::vector<LinearRows> products;
    char* y = project(products, name, x, in, {weight}, {}, {out})[0].data;
    cpu::linear_rows(products.data(), 1);
    return y;
  }

  // a + b, (rows, columns), in the dtype.
  void add(void* sum, const void* a, const void* b, int64_t columns) const {
    const cpu::VectorKernels& kernels = cpu::vector_kernels();
    std::vector<float> wide(2 * rows_ * columns);
    float *x = wide.data(), *y = x + rows_ * columns;
    kernels.pack(x, a, dtype_, columns, rows_, columns, rows_);
    kernels.pack(y, b, dtype_, columns, rows_, columns, rows_);
    for (int64_t e = 0; e < rows_ * columns; ++e) x[e] += y[e];
    kernels.unpack(sum, dtype_, columns, x, nullptr, rows_, columns);
  }

 private:
  const Tensor& x_;
  const DType dtype_;
  const int64_t rows_;
  std::vector<std::vector<char>> buffers_;
};

}  // namespace

Tensor mlstm_block_step(Tensor x, Tensor c, Tensor n, Tensor m, OptTensor state_indices, Tensor norm_mlstm,
                        std::vector<Tensor> qkvo, std::vector<Tensor> gates, std::vector<Tensor> gate_biases,
                        Tensor head_norm, Tensor out_proj, Tensor norm_ffn, std::vector<Tensor> up, Tensor down,
                        double norm_mlstm_eps, double eps, double head_norm_eps, double norm_ffn_eps,
                        std::optional<double> gate_soft_cap) {
  if (x.dim() < 1 || x.size(x.dim() - 1) < 1) value_error("x has shape ", shape_text(x), "; it must be (..., size)");
  check_op_dtype("x", x.scalar_type());
  if (!x.is_contiguous()) x = torch::stable::contiguous(x);
  if (down.dim() != 2) value_error("down has shape ", shape_text(down), "; it must be (out, in)");
  if (c.dim() != 4) value_error("state c has shape ", shape_text(c), "; it must be (slots, heads, dqk, dv)");
  Rows rows(x);
  if (rows.rows() < 1 || rows.rows() > 16) value_error("x has ", rows.rows(), " rows; it must have 1 to 16");
  const int64_t size = x.size(x.dim() - 1), up_size = down.size(1);
  MlstmStep step{};
  step.batch = rows.rows(), step.heads = c.size(1), step.dqk = c.size(2), step.dv = c.size(3);
  set_step_state(step, x, c, n, m, state_indices);
  set_step_options(step, std::nullopt, eps, gate_soft_cap);
  if (up_size < 1 || step.dqk < 1 || step.dv < 1) value_error("down and state c must not be empty");
  const int64_t heads = step.heads, qk_size = heads * step.dqk, v_size = heads * step.dv;

  const char* y = rows.norm(x.data_ptr(), nullptr, nullptr, norm_mlstm, size, norm_mlstm_eps);
  std::vector<LinearRows> products;
  const auto part = rows.project(products, "qkvo", y, size, qkvo, {}, {qk_size, qk_size, v_size, v_size});
  const auto gate = rows.project(products, "gates", y, size, gates, gate_biases, {heads, heads});
  cpu::linear_rows(products.data(), products.size());

  step.dtype = step.gate_dtype = rows.dtype();
  step.q = {part[0].data, part[0].stride, 0, step.dqk};
  step.k = {part[1].data, part[1].stride, 0, step.dqk};
  step.v = {part[2].data, part[2].stride, 0, step.dv};
  step.i = {gate[0].data, gate[0].stride, 0, 1};
  step.f = {gate[1].data, gate[1].stride, 0, 1};
  step.h = rows.buffer(v_size);
  cpu::mlstm_step(step);
  char* gated = rows.buffer(v_size);
  cpu::gated_head_norm({rows.dtype(), rows.dtype(), rows.rows(), heads, step.dv, static_cast<float>(head_norm_eps),
                        step.h, part[3].data, part[3].stride, rows.parameter("head_norm", head_norm, {v_size}), gated});
  const char* mixed = rows.linear("out_proj", gated, v_size, out_proj, size);

  char* sum = rows.buffer(size);
  y = rows.norm(mixed, x.data_ptr(), sum, norm_ffn, size, norm_ffn_eps);
  products.clear();
  const auto wide = rows.project(products, "up", y, size, up, {}, {up_size, up_size});
  cpu::linear_rows(products.data(), products.size());
  Swiglu swiglu{};
  swiglu.dtype = rows.dtype(), swiglu.rows = rows.rows(), swiglu.columns = up_size;
  swiglu.x = wide[0].data, swiglu.x_stride = wide[0].stride;
  swiglu.y = wide[1].data, swiglu.y_stride = wide[1].stride;
  swiglu.out = rows.buffer(up_size);
  cpu::swiglu(swiglu);
  const char* fed = rows.linear("down", swiglu.out, up_size, down, size);
  Tensor out = new_empty(x, sizes_of(x), x.scalar_type());
  rows.add(out.data_ptr(), sum, fed, size);
  return out;
}

}  // namespace flash_xlstm
