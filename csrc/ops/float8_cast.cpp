// Casts of matrices to float8.
#include "ops/launch.h"
#include "params/float8.h"

namespace flash_xlstm {
namespace {

// Rows of x that the CUDA kernels count in 32 bits, and columns.
constexpr int64_t most_rows = int64_t{1} << 30;

Tensors<4> float8_cast(std::vector<Tensor> x, bool by_row, bool by_column) {
  const int64_t count = static_cast<int64_t>(x.size());
  if (count < 1 || count > Float8Cast::max_parts) {
    value_error("x has ", count, " tensors; it must have 1 to ", int64_t{Float8Cast::max_parts});
  }
  if (!by_row && !by_column) value_error("by_row and by_column are both False; at least one must be True");
  Float8Cast p{};
  p.count = static_cast<int>(count);
  for (int64_t each = 0; each < count; ++each) {
    const std::string name = join_text("x[", each, "]");
    Tensor& part = x[each];
    check_shape(name.c_str(), part, {-1, each == 0 ? -1 : p.columns}, "(rows, columns)");
    if (each == 0) {
      check_op_dtype(name.c_str(), part.scalar_type());
      p.dtype = to_dtype(part.scalar_type());
      p.columns = part.size(1);
    }
    check_dtype(name.c_str(), part, x[0].scalar_type(), ", as x[0]");
    check_device(name.c_str(), part, x[0], "x[0]");
    if (part.numel() == 0) value_error(name, " has shape ", shape_text(part), "; it must have elements");
    part = with_uniform_rows(part);
    p.part[each] = {.x = part.data_ptr(), .rows = part.size(0), .stride = row_stride(part)};
    p.rows += part.size(0);
  }
  if (x[0].is_cuda() && (p.rows > most_rows || p.columns > most_rows)) {
    value_error("x has ", p.rows, " rows of ", p.columns, "; on CUDA there may be ", most_rows, " of each");
  }
  const auto empty = [&](bool wanted, int64_t rows, int64_t columns, ScalarType dtype) {
    return wanted ? new_empty(x[0], {rows, columns}, dtype) : new_empty(x[0], {0, 0}, dtype);
  };
  Tensor rows = empty(by_row, p.rows, p.columns, ScalarType::Float8_e4m3fn);
  Tensor row_scales = empty(by_row, p.rows, 1, ScalarType::Float);
  Tensor columns = empty(by_column, p.columns, p.rows, ScalarType::Float8_e4m3fn);
  Tensor column_scales = empty(by_column, p.columns, 1, ScalarType::Float);
  if (by_row) {
    p.by_row = static_cast<uint8_t*>(rows.data_ptr());
    p.row_scales = static_cast<float*>(row_scales.data_ptr());
  }
  if (by_column) {
    p.by_column = static_cast<uint8_t*>(columns.data_ptr());
    p.column_scales = static_cast<float*>(column_scales.data_ptr());
  }
  run<cpu::float8_cast, cuda::float8_cast, cuda::float8_cast_workspace_bytes>("float8_cast", x[0], p);
  return {rows, row_scales, columns, column_scales};
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(FLASH_XLSTM_OPS, lib) {
  // The tensors of x lie one below the other. What is not wanted is empty.
  lib.def(
      "float8_cast(Tensor[] x, bool by_row, bool by_column) "
      "-> (Tensor rows, Tensor row_scales, Tensor columns, Tensor column_scales)");
}

IMPLEMENT_OPS(lib) { lib.impl("float8_cast", TORCH_BOX(&float8_cast)); }

}  // namespace flash_xlstm
