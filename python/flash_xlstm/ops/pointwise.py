"""Pointwise ops."""

from __future__ import annotations

import torch
from torch import Tensor

from flash_xlstm.ops import _common


def soft_cap(x: Tensor, cap: float | None) -> Tensor:
    """Soft-capped `x`: ``cap * tanh(x / cap)``, computed in float32 and rounded once.

    Args:
        x: any shape; float32, bfloat16 or float16; CPU or CUDA.
        cap: finite and greater than 0, or None for no cap (`x` itself is returned).

    Returns:
        A tensor of x's shape and dtype. Differentiable in x, once.

    Raises:
        ValueError: `cap` is not finite or not greater than 0.
        TypeError: `x` has another dtype.
    """
    if cap is None:
        return x
    return _soft_cap(x, float(cap))


@torch.library.register_fake("flash_xlstm::soft_cap")
def _(x: Tensor, cap: float) -> Tensor:
    return x.new_empty(x.shape)


@torch.library.register_fake("flash_xlstm::soft_cap_backward")
def _(dy: Tensor, x: Tensor, cap: float) -> Tensor:
    return x.new_empty(x.shape)


def _setup_context(ctx, inputs, output) -> None:
    x, ctx.cap = inputs
    ctx.save_for_backward(x)


def _backward(ctx, dy):
    (x,) = ctx.saved_tensors
    return _soft_cap_backward(dy, x, ctx.cap), None


_soft_cap = _common.differentiable("soft_cap", _setup_context, _backward)
_soft_cap_backward = _common.no_double_backward("soft_cap_backward")
