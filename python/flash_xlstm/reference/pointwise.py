"""Plain PyTorch forms of the pointwise ops."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["gated_head_norm", "rms_norm", "soft_cap", "swiglu"]


def soft_cap(x: Tensor, cap: float | None) -> Tensor:
    """``cap * tanh(x / cap)``, in float32 (float64 for float64), rounded once to the dtype of x."""
    if cap is None:
        return x
    return (cap * torch.tanh(_wide(x) / cap)).to(x.dtype)


def cap_gate(gate: Tensor, cap: float | None) -> Tensor:
    """:func:`soft_cap` for gates. Infinities, which mark padding, are unchanged and have a gradient of 0."""
    return gate if cap is None else torch.where(gate.isinf(), gate.detach(), soft_cap(gate, cap))


def rms_norm(x, weight, eps=1e-6, residual=None):
    """``x / sqrt(mean(x^2) + eps) * weight``, or a pair of it and ``x + residual``, as
    :func:`flash_xlstm.ops.rms_norm`."""
    if residual is not None:
        x = x + residual
    wide = _wide(x)
    normed = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps) * weight.to(wide.dtype)
    return normed.to(x.dtype) if residual is None else (normed.to(x.dtype), x)


def gated_head_norm(h, gate, weight, eps=1e-6):
    """``sigmoid(gate)`` times the LayerNorm of each head, as :func:`flash_xlstm.ops.gated_head_norm`."""
    wide = _wide(h)
    centred = wide - wide.mean(-1, keepdim=True)
    normed = centred * torch.rsqrt(centred.square().mean(-1, keepdim=True) + eps)
    return (torch.sigmoid(gate.to(wide.dtype)) * normed.flatten(-2) * weight.to(wide.dtype)).to(h.dtype)


def swiglu(x, y):
    """``silu(x) * y``, as :func:`flash_xlstm.ops.swiglu`."""
    return (F.silu(_wide(x)) * _wide(y)).to(x.dtype)


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()
