"""The end state of the mLSTM alone: what a piece of a sequence does to the state before it."""

from __future__ import annotations

import torch
from torch import Tensor

from flash_xlstm.ops import _common, _errors


def mlstm_state(
    k: Tensor,
    v: Tensor,
    i: Tensor,
    f: Tensor,
    *,
    gate_soft_cap: float | None = None,
    chunk_size: int | None = None,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The end state of a piece of a sequence and the decay of what came before it, without h.

    The recurrence is that of :func:`flash_xlstm.ops.mlstm`, from a state without any weight: c and n of 0, and m of
    -1e30, which stands for minus infinity. So the state says what the piece's own tokens add. A state ``(C, N, M)``
    before the piece becomes, exactly ::

        m' = max(log_decay + M, m)
        c' = exp(log_decay + M - m') C + exp(m - m') c        # n' likewise

    Args:
        k: (batch, seq, heads, dqk); float32, bfloat16 or float16; CPU or CUDA. Any strides, as long as the last
            dimension is contiguous.
        v: (batch, seq, heads, dv), dtype and layout as k.
        i, f, gate_soft_cap, chunk_size, cu_seqlens: as in :func:`flash_xlstm.ops.mlstm`. A piece of nothing but padding
            leaves the state without weight, with a log decay of 0.

    Returns:
        ``(c, n, m, log_decay)``, float32: c (batch, heads, dqk, dv), n (batch, heads, dqk), m (batch, heads), and
        log_decay (batch, heads), the sum of ``logsigmoid(f)``. All have exact gradients.

    Under autocast k and v are cast to the autocast dtype; gates keep theirs.

    Raises:
        ValueError, TypeError: an argument has a wrong shape, dtype, device, layout or value. The text names it. Nothing
            has run.
    """
    try:
        k, v = _common.autocast(k, v)
        return _mlstm_state(k, v, i, f, cu_seqlens, gate_soft_cap, _common.chunk_size_or_0(chunk_size))
    except Exception as error:
        if torch.compiler.is_compiling():
            raise
        raise _errors.explain(error, mlstm_state, locals()) from None


@_common.register_fake("mlstm_state")
def _(k, v, i, f, cu_seqlens, gate_soft_cap, chunk_size):
    _common.no_mixed_meta(k, of="k", v=v, i=i, f=f, cu_seqlens=cu_seqlens)
    states, heads, dqk, dv = _common.num_seqs(k, cu_seqlens), *(_common.size(k, d) for d in (2, 3)), _common.size(v, 3)
    shapes = (states, heads, dqk, dv), (states, heads, dqk), (states, heads), (states, heads)
    return tuple(k.new_empty(shape, dtype=torch.float32) for shape in shapes)


def piece_floats(batch: int, heads: int, dqk: int, dv: int) -> int:
    """The floats of :data:`mlstm_piece`'s result."""
    return -(batch * heads * (dqk * dv + dqk + 2) // -4) * 4


@_common.register_fake("mlstm_piece")
def _(k, v, i, f, gate_soft_cap, chunk_size, from_zero):
    _common.no_mixed_meta(k, of="k", v=v, i=i, f=f)
    batch, heads, dqk = (_common.size(k, d) for d in (0, 2, 3))
    return k.new_empty((piece_floats(batch, heads, dqk, _common.size(v, 3)),), dtype=torch.float32)


@_common.register_fake("mlstm_state_backward")
def _(dc_last, dn_last, dm_last, dlog_decay, k, v, i, f, cu_seqlens, gate_soft_cap, chunk_size):
    return _common.fake_gradients(k, k, v, i, f)[1:]


def _setup_context(ctx, inputs, output) -> None:
    k, v, i, f, cu_seqlens, *ctx.options = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(k, v, i, f, cu_seqlens)


def _backward(ctx, dc, dn, dm, dlog_decay):
    return *_mlstm_state_backward(dc, dn, dm, dlog_decay, *ctx.saved_tensors, *ctx.options), None, None, None


_mlstm_state = _common.differentiable("mlstm_state", _setup_context, _backward)
_mlstm_state_backward = _common.no_double_backward("mlstm_state_backward")
mlstm_piece = _common.without_gradients("mlstm_piece")
