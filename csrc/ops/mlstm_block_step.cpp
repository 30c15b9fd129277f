// A whole mLSTM block on one token of each row, in one call: in a small model, calls are most of a token's time.
//   CPU: the kernels of the parts one after the other. Each rounds as its own operator does.
//   CUDA: eight launches. The residuals and the SwiGLU are in the products' epilogues (cuda/linear/linear_rows.cu), so
//     results are rounded less often.
#include <optional>
#include <vector>

#include "cpu/vector_kernels.h"
#include "ops/launch.h"
#include "ops/mlstm_step.h"
#include "params/linear.h"
#include "params/mlstm.h"
#include "params/pointwise.h"
#ifdef FLASH_XLSTM_WITH_CUDA
#include "cuda/common/status.h"
#endif

namespace flash_xlstm {
namespace {

// The output of one of several layers with the same input: rows `stride` elements apart.
struct Part {
  char* data;
  int64_t stride;
};

// The token's rows, and the memory of the block's intermediate results.
class Rows {
 public:
  explicit Rows(const Tensor& x) : x_(x), dtype_(to_dtype(x.scalar_type())), rows_(x.numel() / x.size(x.dim() - 1)) {}

  DType dtype() const { return dtype_; }
  int64_t rows() const { return rows_; }
  int64_t item() const { return element_bytes(dtype_); }

  char* buffer(int64_t columns) {
    const int64_t bytes = checked_product("a row of this block", {rows_, columns, item()});
#ifdef FLASH_XLSTM_WITH_CUDA
    if (!x_.is_cpu()) return static_cast<char*>(scratch_.emplace_back(bytes).data());
#endif
    return buffers_.emplace_back(bytes).data();
  }

  const void* parameter(const char* name, const Tensor& t, const std::vector<int64_t>& sizes) const {
    check_shape(name, t, sizes, sizes.size() == 2 ? "(out, in)" : "(features,)");
    check_dtype(name, t, x_.scalar_type(), ", as x");
    check_device(name, t, x_, "x");
    if (!t.is_contiguous()) value_error(name, " must be contiguous");
    return t.data_ptr();
  }

  // x (rows, in) times the weights of layers with `sizes` outputs, which are stacked in one tensor or separate. Appends
  // the products to `products` and gives where their outputs will be.
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
      const void* const weight = parameter(name, weights[w], {out, in});
      const void* const bias = biases.empty() ? nullptr : parameter(name, biases[w], {out});
      char* y = buffer(out);
      products.push_back({.dtype = dtype_,
                          .rows = rows_,
                          .in = in,
                          .out = out,
                          .x = x,
                          .x_stride = in,
                          .weight = weight,
                          .bias = bias,
                          .y = y});
      if (!stacked) parts.push_back({y, out});
      for (int64_t offset = 0, part = 0; stacked && offset < total; offset += sizes[part++]) {
        parts.push_back({y + offset * item(), total});
      }
    }
    return parts;
  }

  RmsNorm norm_of(const void* x, const Tensor& weight, int64_t size, double eps) {
    return {.dtype = dtype_,
            .weight_dtype = dtype_,
            .rows = rows_,
            .dim = size,
            .eps = check_eps("a norm's eps", eps),
            .x = x,
            .weight = parameter("norm", weight, {size}),
            .y = buffer(size)};
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
  std::vector<std::vector<char>> buffers_;  // on the CPU
#ifdef FLASH_XLSTM_WITH_CUDA
  std::vector<Scratch> scratch_;  // on CUDA
#endif
};

#ifdef FLASH_XLSTM_WITH_CUDA
// `products` of one x as one launch.
FusedLinearRows fused(const std::vector<LinearRows>& products) {
  const LinearRows& first = products[0];
  FusedLinearRows p{};
  p.dtype = first.dtype;
  p.rows = first.rows, p.in = first.in;
  p.x = first.x, p.x_stride = first.x_stride;
  p.constant_weights = true;  // work before the block has ended by then, see holds_next below
  for (const LinearRows& y : products) {
    p.part[p.count++] = {.weight = y.weight, .bias = y.bias, .y = y.y, .out = y.out};
  }
  return p;
}

void check_cuda_limits(const Tensor& x, const std::vector<LinearRows>& products) {
  if (to_dtype(x.scalar_type()) != linear_cuda_dtype) {
    type_error("x has dtype ", dtype_text(x.scalar_type()), "; on CUDA it must be bfloat16");
  }
  for (const LinearRows& p : products) {
    if (p.in % linear_in_multiple != 0 || reinterpret_cast<uintptr_t>(p.weight) % linear_alignment != 0) {
      value_error("on CUDA weights must begin at multiples of ", linear_alignment, " bytes and have a multiple of ",
                  linear_in_multiple, " columns");
    }
  }
}
#endif

Tensor mlstm_block_step(Tensor x, Tensor c, Tensor n, Tensor m, OptTensor state_indices, Tensor norm_mlstm,
                        std::vector<Tensor> qkvo, std::vector<Tensor> gates, std::vector<Tensor> gate_biases,
                        Tensor head_norm, Tensor out_proj, Tensor norm_ffn, std::vector<Tensor> up, Tensor down,
                        double norm_mlstm_eps, double eps, double head_norm_eps, double norm_ffn_eps,
                        std::optional<double> gate_soft_cap, [[maybe_unused]] bool constant_weights) {
  if (x.dim() < 1 || x.size(x.dim() - 1) < 1) value_error("x has shape ", shape_text(x), "; it must be (..., size)");
  check_op_dtype("x", x.scalar_type());
  x = as_contiguous(x);
  if (down.dim() != 2) value_error("down has shape ", shape_text(down), "; it must be (out, in)");
  if (c.dim() != 4) value_error("state c has shape ", shape_text(c), "; it must be (slots, heads, dqk, dv)");
#ifdef FLASH_XLSTM_WITH_CUDA
  // Scratch memory is the current device's.
  std::optional<torch::stable::accelerator::DeviceGuard> guard;
  if (x.is_cuda()) guard.emplace(x.get_device_index());
#endif
  Rows rows(x);
  if (rows.rows() < 1 || rows.rows() > linear_max_rows) {
    value_error("x has ", rows.rows(), " rows; it must have 1 to ", linear_max_rows);
  }
  const int64_t size = x.size(x.dim() - 1), up_size = down.size(1);
  MlstmStep step{};
  step.batch = rows.rows(), step.heads = c.size(1), step.dqk = c.size(2), step.dv = c.size(3);
  set_step_state(step, x, c, n, m, state_indices);
  set_step_options(step, std::nullopt, eps, gate_soft_cap);
  if (up_size < 1 || step.dqk < 1 || step.dv < 1) value_error("down and state c must not be empty");
  const int64_t heads = step.heads;
  const int64_t qk_size = checked_product("a row of q", {heads, step.dqk});
  const int64_t v_size = checked_product("a row of v", {heads, step.dv});

  Tensor out = new_empty(x, sizes_of(x), x.scalar_type());
  const auto set_step = [&](const std::vector<Part>& part, const std::vector<Part>& gate) {
    step.dtype = step.gate_dtype = rows.dtype();
    const auto heads_of = [](const Part& p, int64_t dim) {
      return Strided{.data = p.data, .batch = p.stride, .head = dim};
    };
    step.q = heads_of(part[0], step.dqk), step.k = heads_of(part[1], step.dqk), step.v = heads_of(part[2], step.dv);
    step.i = heads_of(gate[0], 1), step.f = heads_of(gate[1], 1);
    step.h = rows.buffer(v_size);
  };
  const auto head_norm_of = [&](const Part& gate) {
    return GatedHeadNorm{.dtype = rows.dtype(),
                         .weight_dtype = rows.dtype(),
                         .tokens = rows.rows(),
                         .heads = heads,
                         .dim = step.dv,
                         .eps = check_eps("head_norm_eps", head_norm_eps),
                         .h = step.h,
                         .gate = gate.data,
                         .gate_stride = gate.stride,
                         .weight = rows.parameter("head_norm", head_norm, {v_size}),
                         .y = rows.buffer(v_size)};
  };
  // All checks come before the first kernel.
  std::vector<LinearRows> products;
  if (x.is_cpu()) {
    const RmsNorm norm = rows.norm_of(x.data_ptr(), norm_mlstm, size, norm_mlstm_eps);
    const auto part = rows.project(products, "qkvo", norm.y, size, qkvo, {}, {qk_size, qk_size, v_size, v_size});
    const auto gate = rows.project(products, "gates", norm.y, size, gates, gate_biases, {heads, heads});
    set_step(part, gate);
    const GatedHeadNorm gated = head_norm_of(part[3]);
    std::vector<LinearRows> mix, wide, last;
    const char* const mixed = rows.project(mix, "out_proj", gated.y, v_size, {out_proj}, {}, {size})[0].data;
    RmsNorm wide_norm = rows.norm_of(mixed, norm_ffn, size, norm_ffn_eps);
    char* const sum = rows.buffer(size);
    wide_norm.residual = x.data_ptr(), wide_norm.sum = sum;
    const auto up_part = rows.project(wide, "up", wide_norm.y, size, up, {}, {up_size, up_size});
    Swiglu swiglu{};
    swiglu.dtype = rows.dtype(), swiglu.rows = rows.rows(), swiglu.columns = up_size;
    swiglu.x = up_part[0].data, swiglu.x_stride = up_part[0].stride;
    swiglu.y = up_part[1].data, swiglu.y_stride = up_part[1].stride;
    swiglu.out = rows.buffer(up_size);
    const char* const fed = rows.project(last, "down", swiglu.out, up_size, {down}, {}, {size})[0].data;

    cpu::rms_norm(norm);
    cpu::linear_rows(products.data(), products.size());
    cpu::mlstm_step(step);
    cpu::gated_head_norm(gated);
    cpu::linear_rows(mix.data(), mix.size());
    cpu::rms_norm(wide_norm);
    cpu::linear_rows(wide.data(), wide.size());
    cpu::swiglu(swiglu);
    cpu::linear_rows(last.data(), last.size());
    rows.add(out.data_ptr(), sum, fed, size);
    return out;
  }
#ifdef FLASH_XLSTM_WITH_CUDA
  if (step.dqk > cuda::max_step_dqk || step.dv > max_norm_dim || size > max_norm_dim) {
    value_error("state c has shape ", shape_text(c), ", x ", shape_text(x), "; on CUDA dqk must be at most ",
                cuda::max_step_dqk, ", dv and the size of x at most ", max_norm_dim);
  }
  if (reinterpret_cast<uintptr_t>(x.data_ptr()) % 16 != 0) x = copy_of(x);
  const void* const x_data = x.data_ptr();
  RmsNorm norm = rows.norm_of(x_data, norm_mlstm, size, norm_mlstm_eps);
  // The products read their weights before their wait. So kernels that wrote the weights must have ended when the norm
  // lets the first product start.
  norm.holds_next = !constant_weights;
  const auto part = rows.project(products, "qkvo", norm.y, size, qkvo, {}, {qk_size, qk_size, v_size, v_size});
  const auto gate = rows.project(products, "gates", norm.y, size, gates, gate_biases, {heads, heads});
  // The step reads the state while this product runs. A kernel just before the block may have written the state.
  FusedLinearRows first = fused(products);
  first.holds_next = step.settled_state = true;
  set_step(part, gate);
  const GatedHeadNorm gated = head_norm_of(part[3]);
  std::vector<LinearRows> all = products;
  const auto product_of = [&](const char* name, const void* from, int64_t in, const Tensor& weight, int64_t columns,
                              void* to, const void* residual) {
    const LinearRows p{.dtype = rows.dtype(),
                       .rows = rows.rows(),
                       .in = in,
                       .out = columns,
                       .x = from,
                       .x_stride = in,
                       .weight = rows.parameter(name, weight, {columns, in}),
                       .y = to};
    all.push_back(p);
    FusedLinearRows product = fused({p});
    product.residual = residual, product.residual_stride = columns;
    return product;
  };
  char* const sum = rows.buffer(size);
  const FusedLinearRows mix = product_of("out_proj", gated.y, v_size, out_proj, size, sum, x_data);
  const RmsNorm wide_norm = rows.norm_of(sum, norm_ffn, size, norm_ffn_eps);
  products.clear();
  rows.project(products, "up", wide_norm.y, size, up, {}, {up_size, up_size});
  all.insert(all.end(), products.begin(), products.end());
  FusedLinearRows wide = fused(products);
  if (wide.count == 1) {  // stacked: two parts of it
    wide.part[1] = wide.part[0];
    wide.part[1].weight = static_cast<const char*>(wide.part[0].weight) + up_size * size * rows.item();
    wide.count = 2;
  }
  wide.part[0].out = wide.part[1].out = up_size;
  wide.swiglu = true;
  const FusedLinearRows last = product_of("down", wide.part[0].y, up_size, down, size, out.data_ptr(), sum);
  check_cuda_limits(x, all);
  const Scratch workspace(cuda::mlstm_step_workspace_bytes(step));
  on_cuda("mlstm_block_step", x, [&](cudaStream_t stream) -> cudaError_t {
    RETURN_IF_FAILED(cuda::rms_norm(norm, stream));
    RETURN_IF_FAILED(cuda::fused_linear_rows(first, stream));
    RETURN_IF_FAILED(cuda::mlstm_step(step, workspace.data(), stream));
    RETURN_IF_FAILED(cuda::gated_head_norm(gated, stream));
    RETURN_IF_FAILED(cuda::fused_linear_rows(mix, stream));
    RETURN_IF_FAILED(cuda::rms_norm(wide_norm, stream));
    RETURN_IF_FAILED(cuda::fused_linear_rows(wide, stream));
    return cuda::fused_linear_rows(last, stream);
  });
#else
  no_cuda_build("mlstm_block_step");
#endif
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(FLASH_XLSTM_OPS, lib) {
  // `qkvo`, `gates` and `up` are the weights of layers that read the same input: q, k, v, output gate; input gate,
  // forget gate; gate, up. They are stacked in one tensor, or separate tensors in that order.
  lib.def(
      "mlstm_block_step(Tensor x, Tensor(a!) c, Tensor(b!) n, Tensor(c!) m, Tensor? state_indices, Tensor norm_mlstm, "
      "Tensor[] qkvo, Tensor[] gates, Tensor[] gate_biases, Tensor head_norm, Tensor out_proj, Tensor norm_ffn, "
      "Tensor[] up, Tensor down, float norm_mlstm_eps, float eps, float head_norm_eps, float norm_ffn_eps, "
      "float? gate_soft_cap, bool constant_weights=False) -> Tensor");
}

IMPLEMENT_OPS(lib) { lib.impl("mlstm_block_step", TORCH_BOX(&mlstm_block_step)); }

}  // namespace flash_xlstm
