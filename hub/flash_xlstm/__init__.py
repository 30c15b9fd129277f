"""The xLSTM's ops as a Hugging Face kernel, forward only: gradients and the docs are in the package flash-xlstm."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ._ops import ops

__all__ = ["layers", "mlstm", "mlstm_step", "rms_norm", "slstm", "slstm_step", "swiglu"]


def _check(*tensors: Tensor | None) -> None:
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors):
        raise RuntimeError(
            "this kernel has no gradients: call it under torch.no_grad(), or use the package flash-xlstm"
        )


def mlstm(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    i: Tensor,
    f: Tensor,
    initial_state: Sequence[Tensor] | None = None,
    *,
    cu_seqlens: Tensor | None = None,
    scale: float | None = None,
    eps: float = 1e-6,
    gate_soft_cap: float | None = None,
) -> tuple[Tensor, tuple[Tensor, Tensor, Tensor]]:
    """The mLSTM over a sequence: q, k (batch, seq, heads, dqk), v (batch, seq, heads, dv), gates (batch, seq, heads),
    states (c, n, m). Returns h and the final state."""
    c, n, m = initial_state or (None, None, None)
    _check(q, k, v, i, f, c, n, m)
    h, _, *last = ops.mlstm(q, k, v, i, f, c, n, m, cu_seqlens, scale, eps, gate_soft_cap, 0, True)
    return h, tuple(last)


def mlstm_step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    i: Tensor,
    f: Tensor,
    state: Sequence[Tensor],
    *,
    scale: float | None = None,
    eps: float = 1e-6,
    gate_soft_cap: float | None = None,
) -> Tensor:
    """A token of the mLSTM, shapes as :func:`mlstm`'s without seq. `state` is written in place. Returns h."""
    _check(q, k, v, i, f, *state)
    return ops.mlstm_step(q, k, v, i, f, *state, None, scale, eps, gate_soft_cap)


def slstm(
    x: Tensor, R: Tensor, b: Tensor, initial_state: Sequence[Tensor] | None = None
) -> tuple[Tensor, tuple[Tensor, Tensor, Tensor, Tensor]]:
    """The sLSTM over a sequence: x (batch, seq, 4, heads, dim) with the gates i, f, z, o, R (4, heads, dim, dim) as
    ``R[gate, head, out, in]``, b (4, heads, dim), states (h, c, n, m). Returns h and the final state."""
    state = initial_state or (None,) * 4
    _check(x, R, b, *state)
    h, _, *last = ops.slstm(x, R, b, *state, None, math.inf, False, True)
    return h, tuple(last)


def slstm_step(x: Tensor, R: Tensor, b: Tensor, state: Sequence[Tensor]) -> Tensor:
    """A token of the sLSTM, x (batch, 4, heads, dim). `state` is written in place. Returns h."""
    _check(x, R, b, *state)
    return ops.slstm_step(x, R, b, *state)


def rms_norm(x: Tensor, weight: Tensor, eps: float = 1e-6) -> Tensor:
    _check(x, weight)
    return ops.rms_norm(x, weight, eps)


def swiglu(x: Tensor, y: Tensor) -> Tensor:
    """silu(x) y."""
    _check(x, y)
    return ops.swiglu(x, y)


from . import layers  # noqa: E402 - it uses the functions
