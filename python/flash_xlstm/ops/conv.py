"""The causal depthwise convolution before the xLSTM's cells (arXiv 2405.04517, figures 9 and 10)."""

from __future__ import annotations

import torch
from torch import Tensor

from flash_xlstm.ops import _common, _errors

_ACTIVATIONS = (None, "silu")


def causal_conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    activation: str | None = None,
    initial_state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    return_final_state: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Depthwise causal convolution::

        y_t = activation(bias + sum over k of weight[:, k] x_{t - kernel + 1 + k})

    The last column of `weight` is that of the token itself. Inputs before the first token are `initial_state`, or
    zeros.

    Args:
        x: (batch, seq, channels); float32, bfloat16 or float16; CPU or CUDA. Any strides, as long as the last dimension
            is contiguous.
        weight: (channels, kernel), kernel from 1 to 8; the dtype of x or float32.
        bias: (channels,) or None; the dtype of x or float32.
        activation: None or ``"silu"``.
        initial_state: (batch, kernel - 1, channels) in the dtype of x: the inputs before the first token, the oldest
            first.
        cu_seqlens: (num_seqs + 1,) int32 offsets of packed sequences, as in :func:`flash_xlstm.ops.mlstm`; states then
            have num_seqs in place of batch.
        return_final_state: also return the last kernel - 1 inputs, (batch, kernel - 1, channels).

    Returns:
        y (batch, seq, channels) in the dtype of x, computed in float32 and rounded once; with `return_final_state`,
        ``(y, state)``. It has first derivatives in x, weight, bias and the state. Autocast casts nothing.

    Raises:
        ValueError, TypeError: an argument has a wrong shape, dtype, device, layout or value. The text names it. Nothing
            has run.
    """
    try:
        _common.check_flag("return_final_state", return_final_state)
        silu = _is_silu(activation)
        y, last = _causal_conv1d(x, weight, bias, initial_state, cu_seqlens, silu, return_final_state)
        return (y, last) if return_final_state else y
    except Exception as error:
        if torch.compiler.is_compiling():
            raise
        raise _errors.explain(error, causal_conv1d, locals()) from None


def causal_conv1d_step(
    x: Tensor, weight: Tensor, bias: Tensor | None, state: Tensor, *, activation: str | None = None
) -> Tensor:
    """One token of :func:`causal_conv1d` for every row of a batch; updates `state` in place.

    Args:
        x: (batch, channels), the last dimension contiguous.
        weight, bias, activation: as :func:`causal_conv1d`.
        state: (batch, kernel - 1, channels) in the dtype of x, contiguous: the earlier inputs, the oldest first.
            **Written in place.**

    Returns:
        y (batch, channels) in the dtype of x.

    Raises:
        ValueError, TypeError: as :func:`causal_conv1d`. The state is unchanged.
        RuntimeError: a gradient is needed, and the step has none. Use ``torch.no_grad()``, or :func:`causal_conv1d`
            with seq 1.
    """
    try:
        silu = _is_silu(activation)
        if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, weight, bias, state)):
            raise RuntimeError(
                "causal_conv1d_step has no gradient, but an argument requires one. Call it under torch.no_grad(), or "
                "use causal_conv1d(..., initial_state=state, return_final_state=True) with seq 1, which has one."
            )
        return _causal_conv1d_step(x, weight, bias, state, silu)
    except Exception as error:
        if torch.compiler.is_compiling():
            raise
        raise _errors.explain(error, causal_conv1d_step, locals()) from None


def _is_silu(activation: str | None) -> bool:
    if activation not in _ACTIVATIONS:
        raise ValueError(f"activation is {activation!r}; it must be None or 'silu'")
    return activation == "silu"


@_common.register_fake("causal_conv1d")
def _(x, weight, bias, state, cu_seqlens, silu, return_final_state):
    _common.no_mixed_meta(x, of="x", weight=weight, bias=bias, initial_state=state, cu_seqlens=cu_seqlens)
    batch, seq, channels = (_common.size(x, d) for d in range(3))
    rows = _common.num_seqs(x, cu_seqlens)
    before = max(_common.size(weight, 1) - 1, 0)
    return x.new_empty((batch, seq, channels)), x.new_empty((rows if return_final_state else 0, before, channels))


@_common.register_fake("causal_conv1d_backward")
def _(dy, dlast, x, weight, bias, state, cu_seqlens, silu):
    dbias = x.new_empty((0,), dtype=torch.float32) if bias is None else bias.new_empty(bias.shape)
    no_state = (0, max(_common.size(weight, 1) - 1, 0), _common.size(x, 2))
    dstate = x.new_empty(no_state if state is None else state.shape)
    return x.new_empty(x.shape), weight.new_empty(weight.shape), dbias, dstate


@_common.register_fake("causal_conv1d_step")
def _(x, weight, bias, state, silu):
    _common.no_mixed_meta(x, of="x", weight=weight, bias=bias, state=state)
    return x.new_empty(x.shape)


def _setup_context(ctx, inputs, output) -> None:
    x, weight, bias, state, cu_seqlens, ctx.silu, ctx.return_final_state = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x, weight, bias, state, cu_seqlens)


def _backward(ctx, dy, dlast):
    x, weight, bias, state, cu_seqlens = ctx.saved_tensors
    dlast = dlast if ctx.return_final_state else None
    dx, dweight, dbias, dstate = _causal_conv1d_backward(dy, dlast, x, weight, bias, state, cu_seqlens, ctx.silu)
    return dx, dweight, None if bias is None else dbias, None if state is None else dstate, None, None, None


_causal_conv1d = _common.differentiable("causal_conv1d", _setup_context, _backward)
_causal_conv1d_step = _common.writing("causal_conv1d_step", 3)
_causal_conv1d_backward = _common.no_double_backward("causal_conv1d_backward")
