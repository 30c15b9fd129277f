// Products of float32 matrices with one left operand, on the CPU.
#include "ops/kernel_for.h"
#include "ops/launch.h"
#include "params/linear.h"

namespace flash_xlstm {
namespace {

// Copies t if neither its rows nor its columns are contiguous.
FloatProducts::Matrix matrix(Tensor& t) {
  const bool transposed = t.stride(1) != 1 && t.stride(0) == 1;
  if (!transposed && t.stride(1) != 1) t = as_contiguous(t);
  return {static_cast<const float*>(t.data_ptr()), t.stride(transposed ? 1 : 0), transposed};
}

void check(const std::string& name, const Tensor& t, Sizes sizes, const char* want) {
  check_shape(name.c_str(), t, sizes, want);
  check_dtype(name.c_str(), t, ScalarType::Float);
  if (!t.is_cpu()) value_error(name, " is on ", device_text(t), "; it must be on the CPU");
}

// outs[x] = a bs[x], on AMX tiles. false, with anything in `outs`, where they must be multiplied otherwise.
bool float_products(Tensor a, std::vector<Tensor> bs, std::vector<Tensor> outs) {
  check("a", a, {-1, -1}, "(rows, depth)");
  if (bs.size() != outs.size()) {
    value_error("outs has ", int64_t(outs.size()), " tensors; it must have as many as bs, ", int64_t(bs.size()));
  }
  const int64_t rows = a.size(0), depth = a.size(1);
  std::vector<FloatProducts::Part> parts;
  for (size_t x = 0; x < bs.size(); ++x) {
    const std::string b_name = join_text("bs[", int64_t(x), "]"), name = join_text("outs[", int64_t(x), "]");
    check(b_name, bs[x], {depth, -1}, "(depth, columns)");
    check(name, outs[x], {rows, bs[x].size(1)}, "(rows, columns)");
    check_last_dim_contiguous(name.c_str(), outs[x]);
    parts.push_back({.b = matrix(bs[x]),
                     .columns = bs[x].size(1),
                     .out = static_cast<float*>(outs[x].data_ptr()),
                     .out_row = outs[x].stride(0)});
  }
  const FloatProducts p{
      .rows = rows, .depth = depth, .a = matrix(a), .parts = parts.data(), .count = std::ssize(parts)};
  return rows > 0 && depth > 0 && cpu::float_products(p);
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(FLASH_XLSTM_OPS, lib) {
  lib.def("float_products(Tensor a, Tensor[] bs, Tensor(a!)[] outs) -> bool");
}

IMPLEMENT_OPS(lib) { lib.impl("float_products", TORCH_BOX(&float_products)); }

}  // namespace flash_xlstm
