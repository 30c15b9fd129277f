"""Products of few rows with a weight matrix, as fast as the weights can be read."""

from __future__ import annotations

import torch
from torch import Tensor

from flash_xlstm.ops import _common


def linear_rows(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``x @ weight.T + bias`` for at most 16 rows: sums in float32, rounded once, the same from run to run.

    Args:
        x: (..., in), at most 16 rows in all. On the CPU float32, bfloat16 or float16; on CUDA bfloat16.
        weight: (out, in), dtype of x, as ``torch.nn.Linear`` keeps it. On CUDA `in` must be a multiple of 8.
        bias: (out,), dtype of x, or None.

    Returns:
        (..., out) in the dtype of x.

    Raises:
        ValueError, TypeError: an argument of the wrong shape, dtype, device or layout, by its name.
        RuntimeError: a gradient would be needed: this product has none. Use ``torch.nn.functional.linear``.
    """
    given = (x, weight) if bias is None else (x, weight, bias)
    if torch.is_grad_enabled() and any(t.requires_grad for t in given):
        raise RuntimeError(
            "linear_rows has no gradient, but an argument requires one. Call it under torch.no_grad(), or use "
            "torch.nn.functional.linear, which is differentiable."
        )
    return torch.ops.flash_xlstm.linear_rows(x, weight, bias)


@torch.library.register_fake("flash_xlstm::linear_rows")
def _(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    _common.no_mixed_meta(x, weight=weight, bias=bias)
    return x.new_empty((*x.shape[:-1], weight.shape[0]))
