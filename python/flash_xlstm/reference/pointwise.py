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
