// The cross entropy of rows of logits, and the scaling of its gradients.
#include <cmath>

#include "ops/kernel_for.h"
#include "ops/launch.h"
#include "params/loss.h"

namespace flash_xlstm {
namespace {

// The cap as the kernels take it: 0 stands for no cap.
float check_soft_cap(std::optional<double> cap) {
  if (!cap) return 0.0f;
  const float value = static_cast<float>(*cap);
  if (!std::isfinite(value) || value <= 0.0f) {
    value_error("soft_cap is ", *cap, "; it must be None, or finite and greater than 0 in float32");
  }
  return value;
}

float check_label_smoothing(double smoothing) {
  if (!(smoothing >= 0.0 && smoothing <= 1.0)) {
    value_error("label_smoothing is ", smoothing, "; it must be from 0 to 1");
  }
  return static_cast<float>(smoothing);
}

float check_z_loss(double z_loss) {
  const float value = static_cast<float>(z_loss);
  if (!(value >= 0.0f) || !std::isfinite(value)) {
    value_error("z_loss is ", z_loss, "; it must be at least 0, and finite in float32");
  }
  return value;
}

// The stride between the rows of a matrix. Each row must be contiguous. CUDA kernels read and write rows in packs.
int64_t check_rows(const char* name, const Tensor& t) {
  check_last_dim_contiguous(name, t);
  const int64_t stride = t.stride(0), pack = cross_entropy_pack;
  if (t.is_cuda() &&
      (stride % pack != 0 || stride < t.size(1) || reinterpret_cast<uintptr_t>(t.data_ptr()) % 16 != 0)) {
    value_error(name, " has rows ", stride, " apart; on CUDA it must be a multiple of ", pack,
                ", at least their length, and the first must begin at a multiple of 16 bytes");
  }
  return stride;
}

// The losses of the rows of `logits` (rows, columns). The gradients of the logits are written to `dlogits`, if given.
// With `scale` (rows) they are multiplied by it.
Tensor cross_entropy_rows(Tensor logits, Tensor labels, OptTensor scale, OptTensor dlogits,
                          std::optional<double> soft_cap, int64_t ignore_index, double label_smoothing, double z_loss) {
  check_shape("logits", logits, {-1, -1}, "(rows, columns)");
  check_dtype("logits", logits, ScalarType::Float);
  const int64_t rows = logits.size(0), columns = logits.size(1);
  check_shape("labels", labels, {rows}, "(rows,)");
  const ScalarType label_type = labels.scalar_type();
  if (label_type != ScalarType::Long && label_type != ScalarType::Int) {
    type_error("labels has dtype ", dtype_text(label_type), "; it must be int64 or int32");
  }
  check_device("labels", labels, logits, "logits");
  if (scale) {
    check_shape("scale", *scale, {rows}, "(rows,)");
    check_dtype("scale", *scale, ScalarType::Float);
    check_device("scale", *scale, logits, "logits");
    *scale = as_contiguous(*scale);
  }
  CrossEntropy p{};
  p.rows = rows;
  p.columns = columns;
  p.logits_stride = check_rows("logits", logits);
  if (dlogits) {
    check_shape("dlogits", *dlogits, {rows, columns}, "the shape of logits");
    check_op_dtype("dlogits", dlogits->scalar_type());
    check_device("dlogits", *dlogits, logits, "logits");
    p.dtype = to_dtype(dlogits->scalar_type());
    p.dlogits = dlogits->data_ptr();
    p.dlogits_stride = check_rows("dlogits", *dlogits);
  }
  p.cap = check_soft_cap(soft_cap);
  p.label_smoothing = check_label_smoothing(label_smoothing);
  p.z_loss = check_z_loss(z_loss);
  p.ignore_index = ignore_index;
  labels = as_contiguous(labels);
  p.labels_are_int32 = label_type == ScalarType::Int;
  p.labels = labels.data_ptr();
  p.logits = static_cast<const float*>(logits.data_ptr());
  p.scale = scale ? static_cast<const float*>(scale->data_ptr()) : nullptr;
  Tensor loss = new_empty(logits, {rows}, ScalarType::Float);
  p.loss = static_cast<float*>(loss.data_ptr());
  if (rows > 0 && columns > 0) run<cpu::cross_entropy, cuda::cross_entropy>("linear_cross_entropy", logits, p);
  return loss;
}

// x times `factor`, which is one float32. The result has the dtype of `like` and is rounded once.
Tensor scaled(Tensor x, Tensor factor, Tensor like) {
  check_op_dtype("like", like.scalar_type());
  if (x.scalar_type() != ScalarType::Float) check_dtype("x", x, like.scalar_type(), ", as like, or float32");
  check_dtype("factor", factor, ScalarType::Float);
  if (factor.numel() != 1) value_error("factor has ", factor.numel(), " elements; it must have 1");
  check_device("factor", factor, x, "x");
  x = as_contiguous(x);
  Tensor out = new_empty(x, sizes_of(x), like.scalar_type());
  const Scaling params{.x_dtype = to_dtype(x.scalar_type()),
                       .out_dtype = to_dtype(like.scalar_type()),
                       .count = x.numel(),
                       .factor = static_cast<const float*>(factor.data_ptr()),
                       .x = x.data_ptr(),
                       .out = out.data_ptr()};
  if (params.count > 0) run<cpu::scaling, cuda::scaling>("linear_cross_entropy", x, params);
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(FLASH_XLSTM_OPS, lib) {
  lib.def("scaled(Tensor x, Tensor factor, Tensor like) -> Tensor");
  lib.def(
      "cross_entropy_rows(Tensor logits, Tensor labels, Tensor? scale, Tensor(a!)? dlogits, float? soft_cap, "
      "int ignore_index, float label_smoothing, float z_loss) -> Tensor loss");
}

IMPLEMENT_OPS(lib) {
  lib.impl("cross_entropy_rows", TORCH_BOX(&cross_entropy_rows));
  lib.impl("scaled", TORCH_BOX(&scaled));
}

static const DescribedOp described_linear_cross_entropy("linear_cross_entropy");

}  // namespace flash_xlstm
