"""Plain PyTorch forms of the pointwise ops."""

from __future__ import annotations

import torch
from torch import Tensor


def soft_cap(x: Tensor, cap: float | None) -> Tensor:
    """``cap * tanh(x / cap)``, in float32 (float64 for float64), rounded once to the dtype of x."""
    if cap is None:
        return x
    wide = x if x.dtype == torch.float64 else x.float()
    return (cap * torch.tanh(wide / cap)).to(x.dtype)


def cap_gate(gate: Tensor, cap: float | None) -> Tensor:
    """:func:`soft_cap` for gates, whose infinities mark padding: they stay as they are, with a gradient of 0."""
    return gate if cap is None else torch.where(gate.isinf(), gate.detach(), soft_cap(gate, cap))
