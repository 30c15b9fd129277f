// Casts of matrices to float8, for products in float8.
#pragma once

#include "params/types.h"

namespace flash_xlstm {

// x (rows, columns) in float8 e4m3: by_row (rows, columns) with a scale for each row, and by_column (columns, rows),
// transposed, with a scale for each column. The scale of values whose largest absolute value is amax is
// 2^k, k = floor(log2(448 / max(amax, 1e-12))), and by_row = round(x 2^k). row_scales and column_scales hold 2^-k.
// Where a row or column has an infinity, its scale is infinite and its finite values are 0. Where it has a NaN, all of
// it is NaN. x lies in parts, one below the other.
struct Float8Cast {
  static constexpr int max_parts = 4;
  struct Part {
    const void* x = nullptr;
    int64_t rows = 0, stride = 0;  // stride: elements between rows
  };
  DType dtype = DType::float32;
  int count = 0;
  Part part[max_parts];
  int64_t rows = 0, columns = 0;                          // rows: of all parts
  uint8_t *by_row = nullptr, *by_column = nullptr;        // contiguous; nullptr: not wanted
  float *row_scales = nullptr, *column_scales = nullptr;  // (rows), (columns)
};
namespace cpu {
void float8_cast(const Float8Cast& params);
}
namespace cuda {
int64_t float8_cast_workspace_bytes(const Float8Cast& params);
cudaError_t float8_cast(const Float8Cast& params, void* workspace, cudaStream_t stream);
}  // namespace cuda

// k of a finite amax, by its bits as float32. Exact, as 448 = 1.75 * 2^8.
static constexpr int float8_exponent(uint32_t amax) {
  const int k = 8 - (static_cast<int>(amax >> 23) - 127) - ((amax & 0x7fffffu) > 0x600000u ? 1 : 0);
  return k < 48 ? k : 48;
}
// Whether amax is so little above 1.75 times a power of 2 that a logarithm in float32 may round k up, as torchao's
// does. No 16-bit amax is.
static constexpr bool float8_exponent_may_round(uint32_t amax) {
  const uint32_t significand = amax & 0x7fffffu;
  return significand > 0x600000u && significand < 0x600200u;
}

}  // namespace flash_xlstm
