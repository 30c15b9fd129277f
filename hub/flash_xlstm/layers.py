"""Layers for `kernels.kernelize`. They have no gradients: register them for Mode.INFERENCE."""

from __future__ import annotations

from torch import Tensor, nn

from . import mlstm, rms_norm, swiglu


class RMSNorm(nn.Module):
    has_backward: bool = False

    weight: Tensor
    variance_epsilon: float

    def forward(self, hidden_states: Tensor) -> Tensor:
        return rms_norm(hidden_states, self.weight, self.variance_epsilon)


class SiluAndMul(nn.Module):
    has_backward: bool = False

    def forward(self, x: Tensor) -> Tensor:
        return swiglu(*x.chunk(2, dim=-1))


class mLSTM(nn.Module):
    """The cell of a layer: queries, keys and values (batch, seq, heads, dim), gates (batch, seq, heads)."""

    has_backward: bool = False

    def forward(self, q: Tensor, k: Tensor, v: Tensor, i: Tensor, f: Tensor) -> Tensor:
        return mlstm(q, k, v, i, f)[0]
