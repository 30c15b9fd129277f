"""What the op families share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import flash_xlstm._build  # noqa: F401  (registers the operators)


def autocast(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Casts floating-point tensors to the autocast dtype of their device, where autocast is on."""
    device_type = tensors[0].device.type
    if device_type == "meta" or not torch.is_autocast_enabled(device_type):  # torch knows no autocast for meta
        return tensors
    dtype = torch.get_autocast_dtype(device_type)
    return tuple(t.to(dtype) if t.is_floating_point() else t for t in tensors)


def unpack_state(name: str, state) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """The three parts of the argument `name`."""
    if not isinstance(state, (tuple, list)) or len(state) != 3:
        was = f"{len(state)} values" if isinstance(state, (tuple, list)) else f"a {type(state).__name__}"
        raise TypeError(f"{name} is {was}; it must be a tuple of 3 tensors, (c, n, m)")
    return tuple(state)


def no_mixed_meta(first: Tensor, *, of: str = "q", **others: Tensor | None) -> None:
    """For the fakes: a meta tensor among others brings a real call here too, past the operator's own checks. `of` is
    the name of `first`."""
    for name, t in others.items():
        if t is not None and (t.device.type == "meta") != (first.device.type == "meta"):
            raise ValueError(f"{name} is on {t.device}; it must be on the device of {of}, {first.device}")


def _eager(op: Callable[..., Any], differentiated: Callable[..., Any]) -> Callable[..., Any]:
    """Calls `op` past the Python layer that torch.library puts around an operator with a derivative: that layer runs
    without gradients too, and takes as long as all the rest of the call. Compilers get the operator itself."""

    def call(*args):
        if torch.compiler.is_compiling():
            return op(*args)
        if torch.is_grad_enabled() and any(isinstance(x, Tensor) and x.requires_grad for x in args):
            return differentiated(*args)
        with torch._C._AutoDispatchBelowAutograd():
            return op(*args)

    return call


def differentiable(name: str, setup_context: Callable[..., None], backward: Callable[..., Any]) -> Callable[..., Any]:
    """Registers the derivative of the operator `name`, and returns what calls it."""
    op = getattr(torch.ops.flash_xlstm, name).default
    torch.library.register_autograd(f"flash_xlstm::{name}", backward, setup_context=setup_context)

    def forward(*args):
        with torch._C._AutoDispatchBelowAutograd():
            return op(*args)

    members = {"forward": forward, "setup_context": setup_context, "backward": backward}
    function: Any = type(name, (torch.autograd.Function,), {key: staticmethod(f) for key, f in members.items()})
    return _eager(op, function.apply)


def no_double_backward(name: str) -> Callable[..., Any]:
    """Makes differentiating the backward operator `name` raise: these ops have first derivatives only.

    Returns what calls it."""

    def backward(ctx, *grads):
        raise RuntimeError(f"flash_xlstm::{name} has no derivative: double backward is not supported")

    op = getattr(torch.ops.flash_xlstm, name).default
    torch.library.register_autograd(f"flash_xlstm::{name}", backward)
    return _eager(op, op)
