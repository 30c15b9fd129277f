"""Casts of matrices to float8, for products in float8. The layers of the 7B train with it."""

from __future__ import annotations

import torch

from flash_xlstm.ops import _common


@_common.register_fake("float8_cast")
def _(x, by_row, by_column):
    _common.no_mixed_meta(x[0], of="x[0]", **{f"x[{n}]": t for n, t in enumerate(x)})
    rows, columns = sum(t.shape[0] for t in x), x[0].shape[1]
    by_rows, by_columns = ((rows, columns), (rows, 1)), ((columns, rows), (columns, 1))
    shapes = (*(by_rows if by_row else ((0, 0),) * 2), *(by_columns if by_column else ((0, 0),) * 2))
    dtypes = (torch.float8_e4m3fn, torch.float32) * 2
    return tuple(x[0].new_empty(shape, dtype=dtype) for shape, dtype in zip(shapes, dtypes, strict=True))


# (x, by_row, by_column) -> (rows, row_scales, columns, column_scales)
# x is a list of one to four matrices (rows, columns), one below the other, of one dtype: float32, bfloat16 or float16.
# by_row: rows (rows, columns) in float8_e4m3fn, with row_scales (rows, 1) in float32.
# by_column: columns (columns, rows), which is transposed, with column_scales (columns, 1). What is not wanted is empty.
# A value times its scale is x, rounded. Scales are powers of 2, as torchao's recipe "rowwise" makes them: the largest
# absolute value of a row or column becomes more than 224 and at most 448. No derivative.
float8_cast = _common.no_double_backward("float8_cast")
