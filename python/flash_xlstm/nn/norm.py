"""Normalization layers."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def _widen(x: Tensor, force_float32: bool) -> Tensor:
    return x.float() if force_float32 and x.dtype in (torch.bfloat16, torch.float16) else x


class RMSNorm(nn.Module):
    """``x / sqrt(mean(x^2) + eps) * weight + bias`` over the last dimension.

    Args:
        num_features: size of the last dimension.
        eps: added to the mean square.
        use_bias: whether there is a bias.
        force_float32: compute bfloat16 and float16 inputs in float32, weight included, and round once.

    Shape: (..., num_features) in and out; the dtype is kept.
    """

    def __init__(
        self, num_features: int, eps: float = 1e-6, *, use_bias: bool = False, force_float32: bool = True
    ) -> None:
        super().__init__()
        self.eps = eps
        self.force_float32 = force_float32
        self.weight = nn.Parameter(torch.ones(num_features))
        self.bias = nn.Parameter(torch.zeros(num_features)) if use_bias else None

    def forward(self, x: Tensor) -> Tensor:
        wide = _widen(x, self.force_float32)
        y = F.rms_norm(wide, self.weight.shape, self.weight.to(wide.dtype), self.eps)
        if self.bias is not None:
            y = y + self.bias
        return y.to(x.dtype)

    def extra_repr(self) -> str:
        return f"{self.weight.numel()}, eps={self.eps}, bias={self.bias is not None}"


class MultiHeadLayerNorm(nn.Module):
    """Layer norm over each head's own dimension, with one weight for every feature of every head.

    Args:
        num_heads, head_dim: the last two dimensions of the input.
        eps: added to the variance.
        use_bias: whether there is a bias.
        force_float32: compute bfloat16 and float16 inputs in float32, weight included, and round once.

    Shape: (batch, seq, num_heads, head_dim) in, (batch, seq, num_heads * head_dim) out; the dtype is kept.
    """

    def __init__(
        self,
        num_heads: int,
        head_dim: int,
        eps: float = 1e-6,
        *,
        use_bias: bool = False,
        force_float32: bool = True,
    ) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.head_dim = head_dim
        self.eps = eps
        self.force_float32 = force_float32
        self.weight = nn.Parameter(torch.ones(num_heads * head_dim))
        self.bias = nn.Parameter(torch.zeros(num_heads * head_dim)) if use_bias else None

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[-2:] != (self.num_heads, self.head_dim):
            raise ValueError(
                f"x has shape {tuple(x.shape)}; its last two dimensions must be {self.num_heads} heads of "
                f"{self.head_dim}"
            )
        y = F.layer_norm(_widen(x, self.force_float32), (self.head_dim,), eps=self.eps).flatten(-2)
        y = y * self.weight
        if self.bias is not None:
            y = y + self.bias
        return y.to(x.dtype)

    def extra_repr(self) -> str:
        return f"{self.num_heads}, {self.head_dim}, eps={self.eps}, bias={self.bias is not None}"
