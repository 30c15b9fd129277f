"""Plain PyTorch forms of the sLSTM: token by token, its definition.

Products with R run in the dtype of x. Gates, states and everything else run in float32, or in float64 if x is float64.
"""

from __future__ import annotations

import itertools

import torch
import torch.nn.functional as F
from torch import Tensor

from flash_xlstm.reference import _common

State = tuple[Tensor, Tensor, Tensor, Tensor]
MAX_LOG_KEEP = 80.0  # a fresh unit, c = n = 0, would give 0 * inf


class _ClipGradient(torch.autograd.Function):
    """The identity, with a gradient that is clipped element by element."""

    @staticmethod
    def forward(ctx, x, clip):
        ctx.clip = clip
        return x.view_as(x)

    @staticmethod
    def backward(ctx, dx):
        return dx.clamp(-ctx.clip, ctx.clip), None


def _zero_state(x: Tensor, rows: int) -> State:
    shape = (rows, *x.shape[-2:])
    return tuple(torch.zeros(shape, dtype=_common.wide(x.dtype), device=x.device) for _ in range(4))


def _token(x: Tensor, R: Tensor, b: Tensor, state: State, clip: float | None) -> State:
    """The state after a token, whose h is the output. x is (rows, 4, heads, dim), R has the dtype of x, b and the state
    are wide."""
    h, c, n, m = state
    seen = h if clip is None else _ClipGradient.apply(h, clip)
    recurrent = torch.einsum("ghoi,rhi->rgho", R, seen.to(R.dtype)).to(c.dtype)
    i, f, z, o = (x.to(c.dtype) + recurrent + b).unbind(1)

    padding = (i == -torch.inf) & (f == torch.inf)
    # Padding gets finite gates, so that the unused branch has finite gradients.
    i, f, z, o = (torch.where(padding, torch.zeros_like(gate), gate) for gate in (i, f, z, o))
    carried = F.logsigmoid(f) + m
    m_next = torch.where((n == 0) | (i >= carried), i, carried)
    keep, take = torch.exp((carried - m_next).clamp(max=MAX_LOG_KEEP)), torch.exp(i - m_next)
    c_next, n_next = keep * c + take * torch.tanh(z), keep * n + take
    h_next = torch.sigmoid(o) * c_next / n_next
    after = (h_next, c_next, n_next, m_next)
    return tuple(torch.where(padding, old, new) for old, new in zip(state, after, strict=True))


def _sequence(x: Tensor, R: Tensor, b: Tensor, state: State, clip: float | None) -> tuple[Tensor, State]:
    hidden = []
    for t in range(x.shape[1]):
        state = _token(x[:, t], R, b, state, clip)
        hidden.append(state[0])
    if not hidden:
        return x.new_empty(x.shape[0], 0, *x.shape[3:]), state
    return torch.stack(hidden, 1).to(x.dtype), state


def slstm(
    x, R, b, *, initial_state=None, cu_seqlens=None, return_final_state=False, recurrent_grad_clip=None
) -> Tensor | tuple[Tensor, State]:
    """The sLSTM token by token, its definition. Arguments and results are as in :func:`flash_xlstm.ops.slstm`, with any
    float dtype. Final states are float32 (float64 for float64)."""
    wide = _common.wide(x.dtype)
    rows = x.shape[0] if cu_seqlens is None else cu_seqlens.numel() - 1
    state = _zero_state(x, rows) if initial_state is None else tuple(t.to(wide) for t in initial_state)
    R, b = R.to(x.dtype), b.to(wide)
    if cu_seqlens is None:
        h, last = _sequence(x, R, b, state, recurrent_grad_clip)
    else:
        hidden, states = [], []
        for s, (start, stop) in enumerate(itertools.pairwise(cu_seqlens.tolist())):
            first = tuple(t[s : s + 1] for t in state)
            part, end = _sequence(x[:, start:stop], R, b, first, recurrent_grad_clip)
            hidden.append(part)
            states.append(end)
        h, last = torch.cat(hidden, 1), tuple(torch.cat(parts) for parts in zip(*states, strict=True))
    return (h, last) if return_final_state else h


def slstm_step(x, R, b, state) -> Tensor:
    """Reads one token, x (batch, 4, heads, dim). Updates `state` in place and returns h, as
    :func:`flash_xlstm.ops.slstm_step`."""
    wide = _common.wide(x.dtype)
    after = _token(x, R.to(x.dtype), b.to(wide), tuple(t.to(wide) for t in state), None)
    for old, new in zip(state, after, strict=True):
        old.copy_(new)
    return after[0].to(x.dtype)
