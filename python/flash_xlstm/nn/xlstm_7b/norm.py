"""Normalization layers. They reduce in float32 or float64, whatever the input's dtype.

Without a bias, and in float32, bfloat16 or float16, they are ops of this package. With a bias, or in float64, they are
torch's own functions.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flash_xlstm import ops

_OP_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def op_weight(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor | None:
    """The weight in a dtype that the op takes, or None where the op does not serve."""
    if bias is not None or x.dtype not in _OP_DTYPES or weight.dtype not in _OP_DTYPES:
        return None
    return weight if weight.dtype in (torch.float32, x.dtype) else weight.float()


class RMSNorm(nn.Module):
    """``x / sqrt(mean(x^2) + eps) * weight + bias`` over the last dimension.

    Args:
        num_features: size of the last dimension.
        eps: added to the mean square.
        use_bias: whether there is a bias.

    Shape: (..., num_features) in and out; the dtype is kept. With `residual`, the result is a pair: the norm of
    ``x + residual``, and that sum, in one pass over memory.
    """

    def __init__(self, num_features: int, eps: float = 1e-6, *, use_bias: bool = False) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(num_features))
        self.bias = nn.Parameter(torch.zeros(num_features)) if use_bias else None

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor | tuple[Tensor, Tensor]:
        weight = op_weight(x, self.weight, self.bias)
        if residual is not None and (weight is None or residual.dtype != x.dtype):
            x = x + residual
            return self(x), x
        if weight is not None:
            return ops.rms_norm(x, weight, self.eps, residual)
        dtype = torch.promote_types(x.dtype, self.weight.dtype)
        y = F.rms_norm(x.to(dtype), self.weight.shape, self.weight.to(dtype), self.eps)
        return (y if self.bias is None else y + self.bias).to(x.dtype)

    def extra_repr(self) -> str:
        return f"{self.weight.numel()}, eps={self.eps}, bias={self.bias is not None}"


class MultiHeadLayerNorm(nn.Module):
    """Layer norm over each head's dimension. Every feature of every head has its own weight.

    Args:
        num_heads, head_dim: the last two dimensions of the input.
        eps: added to the variance.
        use_bias: whether there is a bias.

    Shape: (batch, seq, num_heads, head_dim) in, (batch, seq, num_heads * head_dim) out; the dtype is kept. With `gate`,
    (batch, seq, num_heads * head_dim), the result is multiplied by ``sigmoid(gate)``, in one pass over memory.
    """

    def __init__(self, num_heads: int, head_dim: int, eps: float = 1e-6, *, use_bias: bool = False) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.head_dim = head_dim
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(num_heads * head_dim))
        self.bias = nn.Parameter(torch.zeros(num_heads * head_dim)) if use_bias else None

    def forward(self, x: Tensor, gate: Tensor | None = None) -> Tensor:
        if x.dim() != 4 or x.shape[2:] != (self.num_heads, self.head_dim):
            raise ValueError(
                f"x has shape {tuple(x.shape)}; it must be (batch, seq, {self.num_heads} heads of {self.head_dim})"
            )
        weight = op_weight(x, self.weight, self.bias)
        if gate is not None and weight is not None and gate.dtype == x.dtype:
            return ops.gated_head_norm(x, gate, weight, self.eps)
        y = self._plain(x)
        return y if gate is None else torch.sigmoid(gate) * y

    def _plain(self, x: Tensor) -> Tensor:
        dtype = torch.promote_types(x.dtype, self.weight.dtype)
        weight, bias = self.weight.to(dtype), None if self.bias is None else self.bias.to(dtype)
        if x.is_cuda:
            y = F.layer_norm(x.to(dtype), (self.head_dim,), eps=self.eps).flatten(2) * weight
            y = y if bias is None else y + bias
        else:
            # A group norm of single positions includes the weight in its one pass. Compared with the two passes above
            # it is quicker on a CPU and slower on a GPU.
            y = F.group_norm(x.to(dtype).flatten(2).flatten(0, 1), self.num_heads, weight, bias, self.eps)
        return y.view(*x.shape[:2], self.num_heads * self.head_dim).to(x.dtype)

    def extra_repr(self) -> str:
        return f"{self.num_heads}, {self.head_dim}, eps={self.eps}, bias={self.bias is not None}"
