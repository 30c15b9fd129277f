"""The sLSTM: scalar memory with exponential gates and memory mixing (xLSTM, arXiv 2405.04517, section 2.2)."""

from __future__ import annotations

import math

import torch
import torch.autograd.forward_ad as forward_ad
from torch import Tensor

from flash_xlstm._build import LIMITS
from flash_xlstm.ops import _common, _errors

SlstmState = tuple[Tensor, Tensor, Tensor, Tensor]
_PARTS = "h, c, n, m"
_KEPT = LIMITS["slstm_kept"]  # values a token and unit that the forward keeps for the backward; on a CPU see below


def slstm(
    x: Tensor,
    R: Tensor,
    b: Tensor,
    *,
    initial_state: SlstmState | None = None,
    cu_seqlens: Tensor | None = None,
    return_final_state: bool = False,
    recurrent_grad_clip: float | None = None,
) -> Tensor | tuple[Tensor, SlstmState]:
    """The sLSTM over a sequence, with exact gradients.

    Per head, gates in the order i, f, z, o (equations 8 to 17 of arXiv 2405.04517, stabilized)::

        (i, f, z, o)_t = x_t + R h_{t-1} + b         # (R h)[gate, out] = sum over in of R[gate, head, out, in] h[in]
        m_t = max(logsigmoid(f_t) + m_{t-1}, i_t)    # a fresh unit, one with n_{t-1} = 0: m_t = i_t
        c_t = exp(logsigmoid(f_t) + m_{t-1} - m_t) c_{t-1} + exp(i_t - m_t) tanh(z_t)
        n_t = exp(logsigmoid(f_t) + m_{t-1} - m_t) n_{t-1} + exp(i_t - m_t)
        h_t = sigmoid(o_t) c_t / n_t

    Args:
        x: (batch, seq, 4, heads, dim) pre-activations; float32, bfloat16 or float16; CPU or CUDA. Any strides, as long
            as the last dimension is contiguous.
        R: (4, heads, dim, dim) recurrent weights, ``R[gate, head, out, in]``; the dtype of x or float32.
        b: (4, heads, dim) bias; the dtype of x or float32.
        initial_state: ``(h, c, n, m)`` before the first token, each (batch, heads, dim) float32. Default: zeros.
        cu_seqlens: (num_seqs + 1,) int32 offsets of packed sequences, on the device of x: sequence s is tokens
            ``cu_seqlens[s]`` to ``cu_seqlens[s + 1]`` of batch row 0 (batch must be 1); states then have num_seqs in
            place of batch. On CUDA the host does not read the values. Wrong ones give wrong results, but no access
            outside the tensors.
        return_final_state: also return the state after the last token.
        recurrent_grad_clip: None, or a bound greater than 0. At every token each element of the gradient that reaches
            h_{t-1} through R is clipped to ``[-recurrent_grad_clip, recurrent_grad_clip]``.

    Returns:
        h (batch, seq, heads, dim) in the dtype of x; with `return_final_state`, ``(h, (h, c, n, m))``, the state in
        float32.

    **Padding.** A unit is padding at a token with ``i = -inf`` and ``f = +inf``. Its h, c, n, m pass through unchanged,
    and z and o are ignored. Its output is the previous h, and its x gets zero gradients. ``f = -inf``, or ``i = -inf``
    with another f, is not a defined input.

    Sums and states are float32. With 16-bit x, the operands R and h_{t-1} of a product may be rounded to the dtype of
    x, and in the backward the gradient of x.

    Under autocast x and R are cast to the autocast dtype and b to float32.

    Raises:
        ValueError, TypeError: an argument has a wrong shape, dtype, device, layout or value. The text names it. Nothing
            has run.
    """
    try:
        is_eager = _common.is_eager()
        if not is_eager or torch._C._is_any_autocast_enabled():
            x, R, b = _autocast(x, R, b)
        state = (None,) * 4 if initial_state is None else _common.unpack_state("initial_state", initial_state, _PARTS)
        clip = math.inf if recurrent_grad_clip is None else recurrent_grad_clip
        inputs = x, R, b, *state, cu_seqlens
        if return_final_state is not False:
            _common.check_flag("return_final_state", return_final_state)
            h, _, *last = _slstm(*inputs, clip, _common.needs_gradients(inputs), True)
            return h, tuple(last)
        if not is_eager:
            return _slstm(*inputs, clip, _common.needs_gradients(inputs), False)[0]
        if forward_ad._current_level >= 0:
            _common.refuse_forward_mode("slstm", inputs)
        if _common.needs_gradients(inputs):
            return _Slstm.apply(*inputs, clip)
        return _slstm_forward(*inputs, clip, False)[0]
    except Exception as error:
        if torch.compiler.is_compiling():
            raise
        raise _errors.explain(error, slstm, locals()) from None


def slstm_step(x: Tensor, R: Tensor, b: Tensor, state: SlstmState) -> Tensor:
    """One token of the sLSTM for every row of a batch; updates `state` in place.

    The recurrence is that of :func:`slstm`.

    Args:
        x: (batch, 4, heads, dim) pre-activations; float32, bfloat16 or float16; CPU or CUDA; last dimension contiguous.
        R: (4, heads, dim, dim), ``R[gate, head, out, in]``; the dtype of x or float32.
        b: (4, heads, dim); the dtype of x or float32.
        state: ``(h, c, n, m)``, each (batch, heads, dim) float32, contiguous. **Written in place.**

    Returns:
        h (batch, heads, dim) in the dtype of x.

    Raises:
        ValueError, TypeError: as :func:`slstm`. The state is unchanged.
        RuntimeError: a gradient is needed, and the step has none. Use ``torch.no_grad()``, or :func:`slstm` with seq 1
            and ``return_final_state=True``.
    """
    try:
        x, R, b = _autocast(x, R, b)
        parts = _common.unpack_state("state", state, _PARTS)
        for name, t in zip("hcnm", parts, strict=True):
            if t is None:
                raise TypeError(f"state {name} is None; it must be a tensor")
        if torch.is_grad_enabled() and any(t.requires_grad for t in (x, R, b, *parts)):
            raise RuntimeError(
                "slstm_step has no gradient, but an argument requires one. Call it under torch.no_grad(), or use "
                "slstm(..., initial_state=state, return_final_state=True) with seq 1, which is differentiable."
            )
        return _slstm_step(x, R, b, *parts)
    except Exception as error:
        if torch.compiler.is_compiling():
            raise
        raise _errors.explain(error, slstm_step, locals()) from None


def _autocast(x: Tensor, R: Tensor, b: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    cast_x, cast_R = _common.autocast(x, R)
    return cast_x, cast_R, b if cast_x is x and cast_R is R else b.float()


@_common.register_fake("slstm_forward")
def _fake(x, R, b, h0, c0, n0, m0, cu_seqlens, recurrent_grad_clip, keep):
    initial = {f"initial_state {name}": t for name, t in zip("hcnm", (h0, c0, n0, m0), strict=True)}
    _common.no_mixed_meta(x, of="x", R=R, b=b, cu_seqlens=cu_seqlens, **initial)
    batch, seq, heads, dim = (_common.size(x, d) for d in (0, 1, 3, 4))
    # params/slstm.h
    arrays = (1, heads, 4 * seq + 2 * ((seq + 1) // 2)) if x.device.type == "cpu" else (seq, heads, _KEPT)
    kept = x.new_empty((batch if keep else 0, *arrays, dim), dtype=torch.float32)
    return x.new_empty((batch, seq, heads, dim)), kept


@_common.register_fake("slstm")
def _(x, R, b, h0, c0, n0, m0, cu_seqlens, recurrent_grad_clip, keep, return_final_state):
    rows = _common.num_seqs(x, cu_seqlens) if return_final_state else 0
    last = (x.new_empty((rows, _common.size(x, 3), _common.size(x, 4)), dtype=torch.float32) for _ in range(4))
    return *_fake(x, R, b, h0, c0, n0, m0, cu_seqlens, recurrent_grad_clip, keep), *last


@_common.register_fake("slstm_fresh_backward")
def _fake_gradients(dh, R, b, cu_seqlens, h, kept, recurrent_grad_clip):
    batch, seq, heads, dim = (_common.size(h, d) for d in range(4))
    return h.new_empty((batch, seq, 4, heads, dim)), R.new_empty(R.shape), b.new_empty(b.shape)


@_common.register_fake("slstm_backward")
def _(dh, dh_last, dc_last, dn_last, dm_last, R, b, h0, c0, n0, m0, cu_seqlens, h, kept, recurrent_grad_clip):
    _, _, heads, dim = (_common.size(h, d) for d in range(4))
    initial = (h.new_empty((0, heads, dim) if t is None else t.shape, dtype=torch.float32) for t in (h0, c0, n0, m0))
    return *_fake_gradients(dh, R, b, cu_seqlens, h, kept, recurrent_grad_clip), *initial


@_common.register_fake("slstm_step")
def _(x, R, b, h, c, n, m):
    state = {f"state {name}": t for name, t in zip("hcnm", (h, c, n, m), strict=True)}
    _common.no_mixed_meta(x, of="x", R=R, b=b, **state)
    return x.new_empty(tuple(_common.size(x, d) for d in (0, 2, 3)))


def _setup_context(ctx, inputs, output) -> None:
    _, R, b, h0, c0, n0, m0, cu_seqlens, ctx.recurrent_grad_clip, ctx.keep, ctx.return_final_state = inputs
    h, kept, *_ = output
    ctx.mark_non_differentiable(kept)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(R, b, h0, c0, n0, m0, cu_seqlens, h, kept)


def _backward(ctx, dh, _dkept, *dlast):
    if not ctx.keep:
        raise RuntimeError("flash_xlstm::slstm was called with keep=False: it has no gradient then")
    return *_gradients(ctx, dh, dlast if ctx.return_final_state else (None,) * 4), None, None, None, None


def _gradients(ctx, dh, dlast):
    R, b, *state, cu_seqlens, h, kept = ctx.saved_tensors
    dx, dR, db, *dstate = _slstm_backward(dh, *dlast, R, b, *state, cu_seqlens, h, kept, ctx.recurrent_grad_clip)
    return dx, dR, db, *(g if t is not None else None for g, t in zip(dstate, state, strict=True))


class _Slstm(torch.autograd.Function):
    """h alone, for eager calls: as mLSTM's."""

    @staticmethod
    def forward(ctx, *args):
        *inputs, ctx.recurrent_grad_clip = args
        h, kept = _slstm_forward(*args, True)
        ctx.save_for_backward(*inputs[1:], h, kept)
        return h

    @staticmethod
    def backward(ctx, dh):
        R, b, h0, _, _, _, cu_seqlens, h, kept = ctx.saved_tensors
        if h0 is not None or torch.is_grad_enabled():  # the second: of a second derivative, which is refused
            return *_gradients(ctx, dh, (None,) * 4), None, None
        return *_slstm_fresh_backward(dh, R, b, cu_seqlens, h, kept, ctx.recurrent_grad_clip), *[None] * 6


_slstm = _common.differentiable("slstm", _setup_context, _backward)
_slstm_forward = _common.without_gradients("slstm_forward")
_slstm_fresh_backward = _common.without_gradients("slstm_fresh_backward")
_slstm_step = _common.writing("slstm_step", 3, 4, 5, 6)
_slstm_backward = _common.no_double_backward("slstm_backward")
