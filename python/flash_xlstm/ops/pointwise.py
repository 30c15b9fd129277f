"""The pointwise ops: soft cap, norms and SwiGLU."""

from __future__ import annotations

import torch
from torch import Tensor

from flash_xlstm.ops import _common, _errors

__all__ = ["gated_head_norm", "rms_norm", "soft_cap", "swiglu"]


def soft_cap(x: Tensor, cap: float | None) -> Tensor:
    """Soft-capped `x`: ``cap * tanh(x / cap)``, computed in float32 and rounded once.

    Args:
        x: any shape; float32, bfloat16 or float16; CPU or CUDA.
        cap: finite and greater than 0, or None for no cap. With None, `x` itself is returned.

    Returns:
        A tensor of x's shape and dtype. Differentiable in x, once.

    Raises:
        ValueError: `cap` is not finite or not greater than 0.
        TypeError: `x` has another dtype.
    """
    try:
        if cap is None:
            return x
        return _soft_cap(x, _common.number("cap", cap))
    except Exception as error:
        if torch.compiler.is_compiling():
            raise
        raise _errors.explain(error, soft_cap, locals()) from None


def rms_norm(
    x: Tensor, weight: Tensor, eps: float = 1e-6, residual: Tensor | None = None
) -> Tensor | tuple[Tensor, Tensor]:
    """``x / sqrt(mean(x^2) + eps) * weight`` over the last dimension, computed in float32 and rounded once.

    Args:
        x: (..., dim); float32, bfloat16 or float16; CPU or CUDA. On CUDA dim is at most 16,384.
        weight: (dim,), float32 or the dtype of x.
        eps: added to the mean square; finite, at least 0.
        residual: shape and dtype of x, or None. With it, ``sum = x + residual`` is rounded to the dtype and normalized.

    Returns:
        The normed x, in x's shape and dtype; with `residual`, ``(normed, sum)``. Differentiable in all tensors, once.
        The weight's gradient is the same from run to run.

    Raises:
        ValueError, TypeError: an argument of the wrong shape, dtype, device or value, by its name.
    """
    try:
        if residual is None:
            return _rms_norm(x, weight, _common.number("eps", eps))
        return _add_rms_norm(x, residual, weight, _common.number("eps", eps))
    except Exception as error:
        if torch.compiler.is_compiling():
            raise
        raise _errors.explain(error, rms_norm, locals()) from None


def gated_head_norm(h: Tensor, gate: Tensor, weight: Tensor, eps: float = 1e-6) -> Tensor:
    """A LayerNorm of each head without a bias, times the output gate, as behind the mLSTM.

    The result is ``sigmoid(gate) * (h - mean(h)) / sqrt(var(h) + eps) * weight``, with mean and variance over the last
    dimension of h. It is computed in float32 and rounded once.

    Args:
        h: (..., heads, dim); float32, bfloat16 or float16; CPU or CUDA. On CUDA dim is at most 16,384.
        gate: (..., heads * dim), pre-activations of the output gate; dtype of h. Rows may lie any distance apart, as in
            part of a wider tensor.
        weight: (heads * dim,), float32 or the dtype of h.
        eps: added to the variance; finite, at least 0.

    Returns:
        (..., heads * dim) in the dtype of h. Differentiable in h, gate and weight, once. The weight's gradient is the
        same from run to run. Values that the dtype cannot hold become infinite, as in torch's own casts. With eps 0
        this may happen to a gradient of float16 h where all values of a head nearly agree.

    Raises:
        ValueError, TypeError: an argument of the wrong shape, dtype, device or value, by its name.
    """
    try:
        return _gated_head_norm(h, gate, weight, _common.number("eps", eps))
    except Exception as error:
        if torch.compiler.is_compiling():
            raise
        raise _errors.explain(error, gated_head_norm, locals()) from None


def swiglu(x: Tensor, y: Tensor | None = None) -> Tensor:
    """``silu(x) * y``, computed in float32 and rounded once.

    Args:
        x, y: the same shape and dtype; float32, bfloat16 or float16; CPU or CUDA. Rows may lie any distance apart, as
            in parts of a wider tensor. Without y, x is (..., 2 * dim) and holds both side by side, as a joined
            projection leaves them. Their gradients are then side by side too.

    Returns:
        A tensor of x's shape and dtype; without y, (..., dim). Differentiable in both, once.

    Raises:
        ValueError, TypeError: an argument of the wrong shape, dtype or device, by its name.
    """
    try:
        return _swiglu_joined(x) if y is None else _swiglu(x, y)
    except Exception as error:
        if torch.compiler.is_compiling():
            raise
        raise _errors.explain(error, swiglu, locals()) from None


@_common.register_fake("soft_cap")
def _(x: Tensor, cap: float) -> Tensor:
    return x.new_empty(x.shape)


@_common.register_fake("soft_cap_backward")
def _(dy: Tensor, x: Tensor, cap: float) -> Tensor:
    return x.new_empty(x.shape)


@_common.register_fake("rms_norm")
def _(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    _common.no_mixed_meta(x, of="x", weight=weight)
    return x.new_empty(x.shape)


@_common.register_fake("add_rms_norm")
def _(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    _common.no_mixed_meta(x, of="x", residual=residual, weight=weight)
    return x.new_empty(x.shape), x.new_empty(x.shape)


@_common.register_fake("rms_norm_backward")
def _(dy, dsum, x, weight, eps, weight_gradient, remake):
    dweight = weight.new_empty(weight.shape if weight_gradient else 0)
    return x.new_empty(x.shape), dweight, x.new_empty(x.shape if remake else 0)


@_common.register_fake("gated_head_norm")
def _(h: Tensor, gate: Tensor, weight: Tensor, eps: float) -> Tensor:
    _common.no_mixed_meta(h, of="h", gate=gate, weight=weight)
    return h.new_empty(gate.shape)


@_common.register_fake("gated_head_norm_backward")
def _(dy, h, gate, weight, eps, weight_gradient):
    return h.new_empty(h.shape), h.new_empty(gate.shape), weight.new_empty(weight.shape if weight_gradient else 0)


@_common.register_fake("swiglu")
def _(x: Tensor, y: Tensor) -> Tensor:
    _common.no_mixed_meta(x, of="x", y=y)
    return x.new_empty(x.shape)


@_common.register_fake("swiglu_backward")
def _(dout: Tensor, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), x.new_empty(x.shape)


@_common.register_fake("swiglu_joined")
def _(z: Tensor) -> Tensor:
    return z.new_empty((*z.shape[:-1], z.shape[-1] // 2))


@_common.register_fake("swiglu_joined_backward")
def _(dout: Tensor, z: Tensor, remake: bool) -> tuple[Tensor, Tensor]:
    return z.new_empty(z.shape), z.new_empty(dout.shape if remake else [0] * dout.dim())


def _setup_context(ctx, inputs, output) -> None:
    x, ctx.cap = inputs
    ctx.save_for_backward(x)


def _backward(ctx, dy):
    (x,) = ctx.saved_tensors
    return _soft_cap_backward(dy, x, ctx.cap), None


_soft_cap = _common.differentiable("soft_cap", _setup_context, _backward)
_soft_cap_backward = _common.no_double_backward("soft_cap_backward")


def _setup_rms_norm(ctx, inputs, output) -> None:
    x, weight, ctx.eps = inputs
    ctx.save_for_backward(x, weight)


def _backward_rms_norm(ctx, dy):
    x, weight = ctx.saved_tensors
    dx, dweight, _ = rms_norm_backward(dy, None, x, weight, ctx.eps, ctx.needs_input_grad[1], False)
    return dx, dweight if ctx.needs_input_grad[1] else None, None


def _setup_add_rms_norm(ctx, inputs, output) -> None:
    _, _, weight, ctx.eps = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(output[1], weight)


def _backward_add_rms_norm(ctx, dy, dsum):
    total, weight = ctx.saved_tensors
    if dy is None:  # only the sum was used
        return dsum, dsum, None, None
    dx, dweight, _ = rms_norm_backward(dy, dsum, total, weight, ctx.eps, ctx.needs_input_grad[2], False)
    return dx, dx, dweight if ctx.needs_input_grad[2] else None, None


def _setup_gated_head_norm(ctx, inputs, output) -> None:
    h, gate, weight, ctx.eps = inputs
    ctx.save_for_backward(h, gate, weight)


def _backward_gated_head_norm(ctx, dy):
    h, gate, weight = ctx.saved_tensors
    dh, dgate, dweight = _gated_head_norm_backward(dy, h, gate, weight, ctx.eps, ctx.needs_input_grad[2])
    return dh, dgate, dweight if ctx.needs_input_grad[2] else None, None


def _setup_swiglu(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs)


def _backward_swiglu(ctx, dout):
    return _swiglu_backward(dout, *ctx.saved_tensors)


def _backward_swiglu_joined(ctx, dout):
    return swiglu_joined_backward(dout, *ctx.saved_tensors, False)[0]


_rms_norm = _common.differentiable("rms_norm", _setup_rms_norm, _backward_rms_norm)
_add_rms_norm = _common.differentiable("add_rms_norm", _setup_add_rms_norm, _backward_add_rms_norm)
rms_norm_backward = _common.no_double_backward("rms_norm_backward")
_gated_head_norm = _common.differentiable("gated_head_norm", _setup_gated_head_norm, _backward_gated_head_norm)
_gated_head_norm_backward = _common.no_double_backward("gated_head_norm_backward")
_swiglu = _common.differentiable("swiglu", _setup_swiglu, _backward_swiglu)
_swiglu_backward = _common.no_double_backward("swiglu_backward")
_swiglu_joined = _common.differentiable("swiglu_joined", _setup_swiglu, _backward_swiglu_joined)
swiglu_joined_backward = _common.no_double_backward("swiglu_joined_backward")
