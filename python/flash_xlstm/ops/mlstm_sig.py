"""The mLSTM with a sigmoid input gate: the mLSTMsig of TFLA (arXiv 2503.14376)."""

from __future__ import annotations

import torch
from torch import Tensor

from flash_xlstm.ops import _common, _errors
from flash_xlstm.ops.mlstm import keeps_for, kept_shape

MlstmSigState = tuple[Tensor, Tensor | None]


def mlstm_sig(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    i: Tensor,
    f: Tensor,
    *,
    normalize: bool = True,
    initial_state: MlstmSigState | None = None,
    scale: float | None = None,
    eps: float = 1e-6,
    gate_soft_cap: float | None = None,
    chunk_size: int | None = None,
    cu_seqlens: Tensor | None = None,
    return_final_state: bool = False,
    keep_states: bool = True,
) -> Tensor | tuple[Tensor, MlstmSigState]:
    """The mLSTM with a sigmoid input gate over a sequence, with exact gradients.

    Both gates are at most 1: no stabilizer is needed. Per head (the mLSTMsig of arXiv 2503.14376)::

        c_t = sigmoid(f_t) c_{t-1} + sigmoid(i_t) k_t v_t^T
        n_t = sigmoid(f_t) n_{t-1} + sigmoid(i_t) k_t
        h_t = scale q_t^T c_t / (max(|scale q_t . n_t|, 1) + eps)

    With ``normalize=False`` there is no n, and::

        h_t = scale q_t^T c_t

    Args:
        q, k: (batch, seq, heads, dqk); float32, bfloat16 or float16; CPU or CUDA. Any strides, as long as the last
            dimension is contiguous.
        v: (batch, seq, heads, dv), dtype and layout as q.
        i, f: (batch, seq, heads) pre-activations of the input and forget gates; float32 or the dtype of q (both the
            same); any strides. A token with ``i = -inf`` and ``f = +inf`` is padding: the state passes through it
            unchanged and its own k, v, i, f get zero gradients. ``f = -inf`` is not a defined input.
        normalize: whether to divide h by the normalizer.
        initial_state: ``(c, n)`` before the first token: c (batch, heads, dqk, dv) float32 or bfloat16, n (batch,
            heads, dqk) float32 (None with ``normalize=False``). Default: zeros.
        scale, eps, gate_soft_cap, chunk_size, cu_seqlens: as in :func:`flash_xlstm.ops.mlstm`. ``normalize=False`` does
            not use eps.
        return_final_state: also return the state after the last token.
        keep_states: as in :func:`flash_xlstm.ops.mlstm`.

    Returns:
        h (batch, seq, heads, dv) in the dtype of q; with `return_final_state`, ``(h, (c, n))``. The final c has the
        dtype of the initial c (float32 without one), and n is None with ``normalize=False``.

    Under autocast q, k, v are cast to the autocast dtype; gates and states keep theirs.

    Raises:
        ValueError, TypeError: an argument has a wrong shape, dtype, device, layout or value. The text names it. Nothing
            has run.
    """
    try:
        _common.check_flag("normalize", normalize)
        _common.check_flag("return_final_state", return_final_state)
        _common.check_flag("keep_states", keep_states)
        q, k, v = _common.autocast(q, k, v)
        c, n = (None, None) if initial_state is None else _common.unpack_state("initial_state", initial_state, "c, n")
        c, state_dtype = _common.float32_c(c)
        inputs = q, k, v, i, f, c, n, cu_seqlens
        h, _, c_last, n_last = _mlstm_sig(
            *inputs, scale, eps, gate_soft_cap, _common.chunk_size_or_0(chunk_size), return_final_state, normalize,
            keep_states and keeps_for(inputs),
        )  # fmt: skip
        if not return_final_state:
            return h
        return h, (c_last.to(state_dtype), n_last if normalize else None)
    except Exception as error:
        if torch.compiler.is_compiling():
            raise
        raise _errors.explain(error, mlstm_sig, locals()) from None


@_common.register_fake("mlstm_sig")
def _(
    q, k, v, i, f, c, n, cu_seqlens, scale, eps, gate_soft_cap, chunk_size, return_final_state, normalize,
    keep_states=False,
):  # fmt: skip
    _common.no_mixed_meta(
        q, k=k, v=v, i=i, f=f, cu_seqlens=cu_seqlens, **{"initial_state c": c, "initial_state n": n}
    )  # fmt: skip
    batch, seq, heads, dqk = (_common.size(q, d) for d in range(4))
    dv = _common.size(v, 3)
    states = _common.num_seqs(q, cu_seqlens) if return_final_state else 0
    new = lambda *shape: q.new_empty(shape, dtype=torch.float32)  # noqa: E731
    return (
        q.new_empty((batch, seq, heads, dv)),
        new(*kept_shape(q, dv, cu_seqlens, keep_states, int(normalize))),
        new(states, heads, dqk, dv),
        new(states if normalize else 0, heads, dqk),
    )


@_common.register_fake("mlstm_sig_backward")
def _(
    dh, dc_last, dn_last, q, k, v, i, f, c, n, cu_seqlens, h, kept,
    scale, eps, gate_soft_cap, chunk_size, normalize,
):  # fmt: skip
    return _common.fake_gradients(q, k, v, i, f, c, n)


def _setup_context(ctx, inputs, output) -> None:
    q, k, v, i, f, c, n, cu_seqlens, *ctx.options, ctx.return_final_state, ctx.normalize = inputs[:14]
    h, kept, *_ = output
    ctx.mark_non_differentiable(kept)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(q, k, v, i, f, c, n, cu_seqlens, _common.kept_h(q, h), kept)


def _backward(ctx, dh, _dkept, dc_last, dn_last):
    q, k, v, i, f, c, n, cu_seqlens, h, kept = ctx.saved_tensors
    if not ctx.return_final_state:
        dc_last = None
    if not (ctx.return_final_state and ctx.normalize):
        dn_last = None
    dq, dk, dv, di, df, dc, dn = _mlstm_sig_backward(
        dh, dc_last, dn_last, q, k, v, i, f, c, n, cu_seqlens, h, kept, *ctx.options, ctx.normalize
    )
    dc, dn = (g if t is not None else None for g, t in ((dc, c), (dn, n)))
    return dq, dk, dv, di, df, dc, dn, *[None] * 8


_mlstm_sig = _common.differentiable("mlstm_sig", _setup_context, _backward)
_mlstm_sig_backward = _common.no_double_backward("mlstm_sig_backward")
