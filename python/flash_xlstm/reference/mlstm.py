"""Plain PyTorch forms of the mLSTM: recurrent, parallel and chunkwise.

All take (batch, seq, heads, dim) tensors like :func:`flash_xlstm.ops.mlstm`. Products run in the dtype of q. Gates,
states and everything else run in float32, or in float64 if q is float64.

The mLSTM with a sigmoid input gate (``mlstm_sig``) uses these forms without the stabilizer: m is 0, and the floor of
the normalizer is 1.
"""

from __future__ import annotations

import dataclasses
import itertools

import torch
import torch.nn.functional as F
from torch import Tensor

from flash_xlstm.reference import _common
from flash_xlstm.reference.pointwise import cap_gate

State = tuple[Tensor, Tensor, Tensor]


@dataclasses.dataclass(frozen=True)
class Options:
    """Options of all forms. scale=None: dqk ** -0.5."""

    scale: float | None
    eps: float
    soft_cap: float | None
    sigmoid: bool = False  # whether the input gate is a sigmoid; m is then 0
    normalize: bool = True  # False is for sigmoid only: h is the numerator

    def log_gates(self, i: Tensor, f: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        i, f = (cap_gate(gate.to(dtype), self.soft_cap) for gate in (i, f))
        return F.logsigmoid(i) if self.sigmoid else i, F.logsigmoid(f)

    def normalizer(self, s: Tensor, m: Tensor) -> Tensor:
        return torch.maximum(s.abs(), torch.exp(-m)) + self.eps if self.normalize else torch.ones_like(s)


def _initial(q, v, initial_state) -> State:
    wide = _common.wide(q.dtype)
    if initial_state is None:
        batch, _, heads, dqk = q.shape
        shapes = (batch, heads, dqk, v.shape[-1]), (batch, heads, dqk), (batch, heads)
        return tuple(torch.zeros(shape, dtype=wide, device=q.device) for shape in shapes)
    return tuple(t.to(wide) for t in initial_state)


def _prepare(q, k, v, i, f, initial_state, options: Options):
    """The inputs with heads before seq, log gates in the wide dtype, the initial state, the options with a scale."""
    state = _initial(q, v, initial_state)
    if options.scale is None:
        options = dataclasses.replace(options, scale=q.shape[-1] ** -0.5)
    i, f = options.log_gates(i, f, _common.wide(q.dtype))
    q, k, v, i, f = (t.transpose(1, 2) for t in (q, k, v, i, f))
    return q, k, v, i, f, state, options


def _packed(form, q, k, v, i, f, cu_seqlens, initial_state, *options):
    """Applies `form` to each packed sequence."""
    offsets = cu_seqlens.tolist()
    hidden, states = [], []
    for s, (start, stop) in enumerate(itertools.pairwise(offsets)):
        first = None if initial_state is None else tuple(t[s : s + 1] for t in initial_state)
        part = [t[:, start:stop] for t in (q, k, v, i, f)]
        if start == stop:
            h, state = part[2], _initial(q, v, first)
        else:
            h, state = form(*part, first, *options)
        hidden.append(h)
        states.append(state)
    return torch.cat(hidden, 1), tuple(torch.cat(parts) for parts in zip(*states, strict=True))


def run(form, q, k, v, i, f, cu_seqlens, return_final_state, initial_state, *options):
    """Applies `form` to the batch, or to each packed sequence."""
    if cu_seqlens is None:
        h, state = form(q, k, v, i, f, initial_state, *options)
    else:
        h, state = _packed(form, q, k, v, i, f, cu_seqlens, initial_state, *options)
    return (h, state) if return_final_state else h


def _update(k, v, i, lf, state: State, options: Options) -> State:
    c, n, m = state
    m_next = m if options.sigmoid else torch.maximum(lf + m, i)
    keep, take = torch.exp(lf + m - m_next), torch.exp(i - m_next)
    kt = take[..., None] * k.to(c.dtype)
    return keep[..., None, None] * c + kt[..., :, None] * v.to(c.dtype)[..., None, :], keep[..., None] * n + kt, m_next


def _read(q, state: State, options: Options) -> Tensor:
    c, n, m = state
    qs = options.scale * q.to(c.dtype)
    d = options.normalizer((qs * n).sum(-1), m)
    return (qs[..., None, :] @ c)[..., 0, :] / d[..., None]


def recurrent(q, k, v, i, f, initial_state, options: Options):
    dtype = q.dtype
    q, k, v, i, lf, state, options = _prepare(q, k, v, i, f, initial_state, options)
    hidden = []
    for t in range(q.shape[2]):
        state = _update(k[:, :, t], v[:, :, t], i[:, :, t], lf[:, :, t], state, options)
        hidden.append(_read(q[:, :, t], state, options))
    return torch.stack(hidden, 1).to(dtype), state


def _chunk(q, k, v, i, lf, state: State, options: Options) -> tuple[Tensor, State]:
    """The parallel form over one chunk, (batch, heads, length, dim), from the state at its start."""
    c, n, m0 = state
    wide, dtype, length, scale = c.dtype, q.dtype, q.shape[2], options.scale
    b = lf.cumsum(-1)
    causal = torch.ones(length, length, dtype=torch.bool, device=q.device).tril()
    log_d = (b[..., :, None] - b[..., None, :] + i[..., None, :]).masked_fill(~causal, -torch.inf)
    m = torch.zeros_like(b) if options.sigmoid else torch.maximum(log_d.amax(-1), b + m0[..., None])
    w = scale * (q @ k.transpose(-1, -2)).to(wide) * torch.exp(log_d - m[..., None])
    g = torch.exp(b + m0[..., None] - m)
    s = w.sum(-1) + scale * g * (q.to(wide) @ n[..., None])[..., 0]
    numerator = (w.to(dtype) @ v).to(wide) + scale * g[..., None] * (q @ c.to(dtype)).to(wide)
    h = numerator / options.normalizer(s, m)[..., None]

    m_last = m[..., -1]
    keep = torch.exp(b[..., -1] + m0 - m_last)
    take = torch.exp(b[..., -1:] - b + i - m_last[..., None])
    kw = take[..., None] * k.to(wide)
    c = keep[..., None, None] * c + (kw.to(dtype).transpose(-1, -2) @ v).to(wide)
    n = keep[..., None] * n + kw.sum(-2)
    return h.to(dtype), (c, n, m_last)


def chunkwise(q, k, v, i, f, initial_state, options: Options, chunk_size: int):
    q, k, v, i, lf, state, options = _prepare(q, k, v, i, f, initial_state, options)
    hidden = []
    for start in range(0, q.shape[2], chunk_size):
        part = slice(start, start + chunk_size)
        qt, kt, vt, it, lft = (t[:, :, part] for t in (q, k, v, i, lf))
        h, state = _chunk(qt, kt, vt, it, lft, state, options)
        hidden.append(h)
    return torch.cat(hidden, 2).transpose(1, 2), state


def parallel(q, k, v, i, f, initial_state, options: Options):
    h, state = _chunk(*_prepare(q, k, v, i, f, initial_state, options))
    return h.transpose(1, 2), state


def mlstm_recurrent(
    q,
    k,
    v,
    i,
    f,
    *,
    initial_state=None,
    scale=None,
    eps=1e-6,
    gate_soft_cap=None,
    cu_seqlens=None,
    return_final_state=False,
):
    """The mLSTM token by token, its definition. Arguments and results are as in :func:`flash_xlstm.ops.mlstm`, with any
    float dtype. Final states are float32 (float64 for float64)."""
    options = Options(scale, eps, gate_soft_cap)
    return run(recurrent, q, k, v, i, f, cu_seqlens, return_final_state, initial_state, options)


def mlstm_parallel(
    q,
    k,
    v,
    i,
    f,
    *,
    initial_state=None,
    scale=None,
    eps=1e-6,
    gate_soft_cap=None,
    cu_seqlens=None,
    return_final_state=False,
):
    """The mLSTM as one chunk, quadratic in seq. Arguments and results as :func:`mlstm_recurrent`."""
    options = Options(scale, eps, gate_soft_cap)
    return run(parallel, q, k, v, i, f, cu_seqlens, return_final_state, initial_state, options)


def mlstm_chunkwise(
    q,
    k,
    v,
    i,
    f,
    *,
    initial_state=None,
    scale=None,
    eps=1e-6,
    gate_soft_cap=None,
    chunk_size=64,
    cu_seqlens=None,
    return_final_state=False,
):
    """The mLSTM chunk by chunk, linear in seq. Arguments and results as :func:`mlstm_recurrent`."""
    options = Options(scale, eps, gate_soft_cap)
    return run(chunkwise, q, k, v, i, f, cu_seqlens, return_final_state, initial_state, options, chunk_size or 64)


def mlstm_state(k, v, i, f, *, gate_soft_cap=None, cu_seqlens=None):
    """The end state and its log decay, as :func:`flash_xlstm.ops.mlstm_state`, as one sum over the tokens. float32
    (float64 for float64)."""
    if cu_seqlens is not None:
        pieces = []
        for start, stop in itertools.pairwise(cu_seqlens.tolist()):
            pieces.append(mlstm_state(*(t[:, start:stop] for t in (k, v, i, f)), gate_soft_cap=gate_soft_cap))
        return tuple(torch.cat(parts) for parts in zip(*pieces, strict=True))
    wide = _common.wide(k.dtype)
    i, f = Options(None, 0.0, gate_soft_cap).log_gates(i, f, wide)
    k, v, i, lf = (t.transpose(1, 2) for t in (k.to(wide), v.to(wide), i, f))
    b = lf.cumsum(-1)
    decay = lf.sum(-1)
    log_weight = decay[..., None] - b + i
    # -1e30 is the m of a state without weight.
    m = F.pad(log_weight, (1, 0), value=-1e30).max(-1).values
    kw = torch.exp(log_weight - m[..., None])[..., None] * k
    return kw.transpose(-1, -2) @ v, kw.sum(-2), m, decay


def mlstm_prefill(
    q,
    k,
    v,
    i,
    f,
    state,
    *,
    state_indices,
    cu_seqlens=None,
    fresh=None,
    scale=None,
    eps=1e-6,
    gate_soft_cap=None,
):
    """Sequences whose states lie in a pool, chunk by chunk. Updates `state` in place and returns h, as
    :func:`flash_xlstm.ops.mlstm_prefill`."""
    slots = state_indices.long()
    used = slots >= 0
    first = [t[slots.clamp_min(0)].to(_common.wide(q.dtype)) for t in state]
    if fresh is not None:
        for t in first:
            t[fresh] = 0.0
    h, last = mlstm_chunkwise(
        q, k, v, i, f, initial_state=tuple(first), scale=scale, eps=eps, gate_soft_cap=gate_soft_cap,
        cu_seqlens=cu_seqlens, return_final_state=True,
    )  # fmt: skip
    for whole, part in zip(state, last, strict=True):
        whole[slots[used]] = part[used].to(whole.dtype)
    if cu_seqlens is None:
        h[~used] = 0.0
    else:
        h[:, torch.repeat_interleave(~used, cu_seqlens.long().diff())] = 0.0
    return h


def mlstm_step(q, k, v, i, f, state, *, state_indices=None, scale=None, eps=1e-6, gate_soft_cap=None):
    """Reads one token, q (batch, heads, dqk). Updates `state` in place and returns h, as
    :func:`flash_xlstm.ops.mlstm_step`."""
    c, n, m = state
    wide = _common.wide(q.dtype)
    rows = torch.arange(q.shape[0], device=q.device)
    slots = rows if state_indices is None else state_indices.long()
    rows = rows[slots >= 0]
    slots = slots[rows]
    current = (c[slots].to(wide), n[slots].to(wide), m[slots].to(wide))
    options = Options(q.shape[-1] ** -0.5 if scale is None else scale, eps, gate_soft_cap)
    log_i, log_f = options.log_gates(i[rows], f[rows], wide)
    current = _update(k[rows], v[rows], log_i, log_f, current, options)
    h = torch.zeros(v.shape, dtype=q.dtype, device=q.device)
    h[rows] = _read(q[rows], current, options).to(q.dtype)
    for whole, part in zip((c, n, m), current, strict=True):
        whole[slots] = part.to(whole.dtype)
    return h
