"""Helpers that the op families share."""

from __future__ import annotations

import contextlib
import functools
import operator
import sys
from collections.abc import Callable
from typing import Any

import torch
import torch._functorch.pyfunctorch as pyfunctorch
import torch.autograd.forward_ad as forward_ad
from torch import Tensor
from torch._library.utils import get_layout_constraint_tag

from flash_xlstm import _build  # registers the operators

_library = torch.library.Library("flash_xlstm", "IMPL")


def register_fake(name: str) -> Callable[..., Any]:
    """Decorates the function that gives the shapes and dtypes of the results of the operator `name`, as
    :func:`torch.library.register_fake`."""
    op = getattr(torch.ops.flash_xlstm, name).default

    def decorate(fake: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(fake)
        def run(*args, **kwargs):
            _tell_inductor(op)
            return fake(*args, **kwargs)

        torch.library.register_fake(f"flash_xlstm::{name}", run)
        return fake

    return decorate


def _tell_inductor(op: Any) -> None:
    """Registers `op` with Inductor, if that is imported, as an operator that is called as it is.

    Inductor registers an unknown operator itself, but first writes the graph before it into a log line. In this line a
    product that adds to the residual stream appears twice in what follows it. So the line doubles with every half
    block. For the loss behind 24 blocks it would have no end.
    """
    lowering: Any = sys.modules.get("torch._inductor.lowering")
    if lowering is None or op in getattr(lowering, "lowerings", (op,)):
        return
    try:
        constraint = lowering.tag_to_layout_constraint(get_layout_constraint_tag(op, with_default=True))
        lowering.make_fallback(op, layout_constraint=constraint, warn=False)
    except (AttributeError, TypeError):  # a torch with other names, where Inductor registers the operator itself
        return


def autocast(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Casts floating-point tensors to the autocast dtype of their device, where autocast is on."""
    if not (torch.compiler.is_compiling() or torch._C._is_any_autocast_enabled()):  # the fast path
        return tensors
    device_type = tensors[0].device.type
    if device_type == "meta" or not torch.is_autocast_enabled(device_type):  # torch has no autocast for meta
        return tensors
    dtype = torch.get_autocast_dtype(device_type)
    return tuple(t.to(dtype) if t.is_floating_point() else t for t in tensors)


def unpack_state(name: str, state, parts: str = "c, n, m") -> tuple[Tensor | None, ...]:
    """The tensors of a state, the argument `name`."""
    count = parts.count(",") + 1
    if not isinstance(state, (tuple, list)) or len(state) != count:
        was = f"{len(state)} values" if isinstance(state, (tuple, list)) else f"a {type(state).__name__}"
        raise TypeError(f"{name} is {was}; it must be a tuple of {count} tensors, ({parts})")
    return tuple(state)


def float32_c(c: Tensor | None) -> tuple[Tensor | None, torch.dtype]:
    """An initial c in float32, which the operators take, and the dtype of the returned c."""
    if c is None or c.dtype == torch.float32:
        return c, torch.float32
    if c.dtype != torch.bfloat16:
        raise TypeError(f"initial_state c has dtype {str(c.dtype)[6:]}; it must be float32 or bfloat16")
    return c.float(), torch.bfloat16


def chunk_size_or_0(chunk_size: int | None) -> int:
    """The operators' chunk_size, where 0 stands for None."""
    if chunk_size is None:
        return 0
    if not isinstance(chunk_size, (int, torch.SymInt)):
        if not hasattr(chunk_size, "__index__"):
            raise TypeError(f"chunk_size is {chunk_size!r:.80}; it must be a whole number or None")
        chunk_size = operator.index(chunk_size)
    if chunk_size == 0 or chunk_size is True:
        most = _build.LIMITS["mlstm_max_chunk_size"]
        raise ValueError(f"chunk_size is {chunk_size}; it must be None or from 1 to {most}")
    return chunk_size


def check_flag(name: str, value: bool) -> None:
    """Refuses anything but a bool: torch would take any number for a flag, and None."""
    if value is not True and value is not False:
        raise TypeError(f"{name} is {value!r:.80}; it must be True or False")


def number(name: str, value: float) -> float:
    """A number as float. Strings, which float() accepts, are refused."""
    if isinstance(value, (str, bytes)):
        raise TypeError(f"{name} is {value!r:.80}; it must be a number")
    return float(value)


def no_mixed_meta(first: Tensor, *, of: str = "q", **others: Tensor | None) -> None:
    """Refuses a mix of meta tensors and others. Such a call dispatches to the fake kernel, past the operator's own
    checks. `of` is the name of `first`."""
    for name, t in others.items():
        if t is not None and (t.device.type == "meta") != (first.device.type == "meta"):
            raise ValueError(f"{name} is on {t.device}; it must be on the device of {of}, {first.device}")


# The fakes accept malformed shapes. The operators raise for them, with the argument's name, in compiled calls too.
def size(t: Tensor, dim: int):
    return t.shape[dim] if t.dim() > dim else 1


def num_seqs(first: Tensor, cu_seqlens: Tensor | None):
    return size(first, 0) if cu_seqlens is None else size(cu_seqlens, 0) - 1


def kept_h(q: Tensor, h: Tensor) -> Tensor | None:
    """h if the mLSTM's backward reads it, else None, which saves its memory."""
    return h if q.is_cuda and q.dtype == torch.float32 else None


def fake_gradients(q: Tensor, k: Tensor, v: Tensor, i: Tensor, f: Tensor, *state: Tensor | None) -> tuple[Tensor, ...]:
    """Fake results of an mLSTM's backward. `state` is c, n, m or the first of them."""
    heads, dqk, dv = size(q, 2), size(q, 3), size(v, 3)
    empty = (0, heads, dqk, dv), (0, heads, dqk), (0, heads)
    shapes = (none if t is None else t.shape for t, none in zip(state, empty, strict=False))
    return (
        *(q.new_empty(t.shape) for t in (q, k, v)),
        *(i.new_empty(t.shape) for t in (i, f)),
        *(q.new_empty(shape, dtype=torch.float32) for shape in shapes),
    )


def is_eager() -> bool:
    """Whether neither a compiler nor functorch traces the call. Both see one operator with a derivative."""
    return not (torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active())


def needs_gradients(args: tuple[Any, ...]) -> bool:
    if torch.is_grad_enabled():
        for x in args:  # any() with a generator takes a microsecond more
            if isinstance(x, Tensor) and x.requires_grad:
                return True
    return False


def _has_tangent(t: Tensor) -> bool:
    """Whether `t` has a tangent at any of functorch's levels. A tangent is visible only while its level is the
    innermost."""
    levels = pyfunctorch.retrieve_all_functorch_interpreters()
    jvp = {each.level() for each in levels if each.key() == torch._C._functorch.TransformType.Jvp}
    while True:
        is_wrapped = torch._C._functorch.is_functorch_wrapped_tensor(t)
        level = torch._C._functorch.maybe_get_level(t) if is_wrapped else 0
        if level in jvp or not is_wrapped:
            with contextlib.ExitStack() as outer:
                for each in levels:
                    if each.level() > level:
                        outer.enter_context(pyfunctorch.temporarily_pop_interpreter_stack())
                if forward_ad.unpack_dual(t).tangent is not None:
                    return True
        if not is_wrapped:
            return False
        t = torch._C._functorch.get_unwrapped(t)


def refuse_forward_mode(name: str, args: Any) -> None:
    """Refuses tangents. To be called within forward-mode differentiation (``forward_ad._current_level >= 0``), since
    the operators would drop tangents.

    Raises:
        RuntimeError: a tensor among `args` has a tangent.
    """
    for t in args:
        if isinstance(t, (list, tuple)):
            refuse_forward_mode(name, t)
        elif isinstance(t, Tensor) and _has_tangent(t):
            raise RuntimeError(
                f"{name} has no forward-mode derivative (torch.func.jvp, torch.func.jacfwd, forward_ad). "
                "Use reverse mode: torch.func.vjp, torch.func.jacrev, torch.autograd.grad."
            )


def _function(name: str, **members: Any) -> Any:
    """The ``apply`` of an autograd.Function with these static methods."""
    methods = {key: staticmethod(f) for key, f in members.items()}
    function: Any = type(
        name, (torch.autograd.Function,), {"generate_vmap_rule": "setup_context" in members, **methods}
    )
    return function.apply


def _eager(
    name: str, op: Callable[..., Any], differentiated: Callable[..., Any], transformed: Callable[..., Any]
) -> Callable[..., Any]:
    """Calls `op` without the Python layer that torch.library puts around an operator with a derivative. That layer runs
    without gradients too, and takes as long as the rest of the call. Compilers get the operator itself. functorch
    (torch.func) gets `transformed`, which it can trace."""

    def call(*args):
        if forward_ad._current_level >= 0:
            refuse_forward_mode(name, args)
        if not is_eager():
            return op(*args) if torch.compiler.is_compiling() else transformed(*args)
        if needs_gradients(args):
            return differentiated(*args)
        with torch._C._AutoDispatchBelowAutograd():
            return op(*args)

    return call


def writing(name: str, *places: int) -> Callable[..., Any]:
    """Returns a function that calls the operator `name`, which writes its arguments at `places` and has no derivative.
    A call increments their version counters, so that a backward that needs the old values raises."""
    op = getattr(torch.ops.flash_xlstm, name).default

    def count(keyset, *args, **kwargs):
        result = op.redispatch(keyset & torch._C._after_ADInplaceOrView_keyset, *args, **kwargs)
        torch._C._increment_version([args[place] for place in places])  # type: ignore[attr-defined]
        return result

    _library.impl(name, count, "ADInplaceOrView", with_keyset=True)

    # The same without the dispatcher's layer, which takes microseconds.
    def call(*args):
        if forward_ad._current_level >= 0:
            refuse_forward_mode(name, args)
        if not is_eager():
            if any(isinstance(t, Tensor) and torch._C._functorch.is_batchedtensor(t) for t in args):
                raise RuntimeError(
                    f"{name} writes its state in place, which torch.func.vmap cannot follow; it is batched"
                )
            return op(*args)
        with torch._C._AutoDispatchBelowADInplaceOrView():
            result = op(*args)
        torch._C._increment_version([args[place] for place in places])  # type: ignore[attr-defined]
        return result

    return call


def without_gradients(name: str) -> Callable[..., Any]:
    """The operator `name`, which has no derivative. To be called where :func:`is_eager` and no gradient is needed."""
    _library.impl(name, torch.library.fallthrough_kernel, "Autograd")  # otherwise torch looks for gradients
    return getattr(torch.ops.flash_xlstm, name).default


def differentiable(name: str, setup_context: Callable[..., None], backward: Callable[..., Any]) -> Callable[..., Any]:
    """Registers the derivative of the operator `name`. Returns a function that calls the operator."""
    op = getattr(torch.ops.flash_xlstm, name).default
    torch.library.register_autograd(f"flash_xlstm::{name}", backward, setup_context=setup_context)

    # Forward includes setup_context. With a separate setup_context, which functorch needs, apply() binds the arguments
    # to forward's signature, which takes half of a call's time.
    def forward(ctx, *args):
        with torch._C._AutoDispatchBelowAutograd():
            output = op(*args)
        setup_context(ctx, args, output)
        return output

    differentiated = _function(name, forward=forward, backward=backward)
    plain = lambda *args: op(*args)  # noqa: E731  (a Function looks at its forward's signature)
    transformed = _function(name, forward=plain, setup_context=setup_context, backward=backward)
    return _eager(name, op, differentiated, transformed)


def no_double_backward(name: str) -> Callable[..., Any]:
    """Makes a derivative of the backward operator `name` raise: these ops have first derivatives only.

    Returns a function that calls the operator."""

    def backward(ctx, *grads):
        raise RuntimeError(f"flash_xlstm::{name} has no derivative: double backward is not supported")

    op = getattr(torch.ops.flash_xlstm, name).default
    torch.library.register_autograd(f"flash_xlstm::{name}", backward)
    plain = lambda *args: op(*args)  # noqa: E731
    nothing = lambda ctx, inputs, output: None  # noqa: E731
    return _eager(name, op, op, _function(name, forward=plain, setup_context=nothing, backward=backward))
