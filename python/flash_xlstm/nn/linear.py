"""Linear layers on few rows, as in decoding, and checks of what a module's call would run."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator, Sequence
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.modules import module as hooks
from torch.overrides import _get_current_function_mode_stack
from torch.utils._device import DeviceContext

from flash_xlstm import ops
from flash_xlstm._build import LIMITS
from flash_xlstm._build import few_rows as few_rows_of

# For each device, the dtypes and the most rows for which linear_rows takes the product.
_CPU, _CUDA = few_rows_of("cpu"), few_rows_of("cuda")
MOST_FEW_ROWS = _CUDA[1]
_IN_MULTIPLE, _ALIGNMENT = LIMITS["linear_cuda_in_multiple"], LIMITS["linear_cuda_alignment"]


class _Captured(threading.local):
    weights_at_rest = False
    streams: tuple[torch.cuda.Stream, ...] = ()


_captured = _Captured()


@contextlib.contextmanager
def weights_at_rest() -> Iterator[None]:
    """For this thread, promises that no kernel that may still run writes a weight. Kernels may then read weights before
    earlier kernels have ended. The promise holds within a captured chain of kernels, which begins when all kernels
    before it have ended. It does not hold for eager calls: another library's kernel may let the next one start before
    it has written."""
    before, _captured.weights_at_rest = _captured.weights_at_rest, True
    try:
        yield
    finally:
        _captured.weights_at_rest = before


def are_weights_at_rest() -> bool:
    """Whether this thread is within :func:`weights_at_rest`."""
    return _captured.weights_at_rest


@contextlib.contextmanager
def side_by_side(streams: tuple[torch.cuda.Stream, ...]) -> Iterator[None]:
    """For this thread, :func:`linears` of more rows than :func:`few_rows` allows run at once, on the current stream and
    on `streams`. One product of some ten rows does not fill a GPU. This is for captures, where another stream costs
    only an edge of the graph."""
    before, _captured.streams = _captured.streams, streams
    try:
        yield
    finally:
        _captured.streams = before


def linears(layers: Sequence[nn.Module], x: Tensor) -> tuple[Tensor, ...]:
    """``tuple(linear(layer, x) for layer in layers)``."""
    streams = _captured.streams[: len(layers) - 1]
    if not streams or few_rows(x):
        return tuple(linear(layer, x) for layer in layers)
    own = torch.cuda.current_stream(x.device)
    ready, out = own.record_event(), []
    for place, layer in enumerate(layers):
        stream = own if place == 0 else streams[(place - 1) % len(streams)]
        if stream is not own:
            stream.wait_event(ready)
        with torch.cuda.stream(stream):
            out.append(linear(layer, x))
    for stream in streams:
        own.wait_stream(stream)
    return tuple(out)


def torch_own(function: Callable[..., Any], home: ModuleType) -> Callable[..., Any] | None:
    """`function` if `home` defines it. None if it was replaced before this package was imported."""
    return function if getattr(function, "__globals__", None) is vars(home) else None


# The functions that a call of a linear layer runs.
_CALL = torch_own(nn.Linear.__call__, hooks)
_FORWARD = torch_own(nn.Linear.forward, nn.modules.linear)
_LINEAR = torch._C._nn.linear


def linear(layer: nn.Module, x: Tensor) -> Tensor:
    """``layer(x)``. :func:`flash_xlstm.ops.linear_rows` makes it where x has few rows, no gradient is needed, and
    `layer` is a plain linear layer that nothing changes or looks at (:func:`few_rows`, :func:`own_parameters`)."""
    if type(layer) is nn.Linear and few_rows(x):
        own = own_parameters(layer, nn.Linear, x)
        if own is not None:
            weight, bias = own
            if x.is_cpu or (weight.shape[-1] % _IN_MULTIPLE == 0 and weight.data_ptr() % _ALIGNMENT == 0):
                return ops.linear_rows(x, weight, bias, constant_weights=_captured.weights_at_rest)
    return layer(x)


def few_rows(x: Tensor) -> bool:
    """Whether x and torch's global state allow products with x by :func:`flash_xlstm.ops.linear_rows`. There must be
    few rows, no gradients of either mode, no autocast, compiler or transform, no replaced forward of
    :class:`~torch.nn.Linear`, and :func:`nothing_looks_on`."""
    if not (x.is_cpu or x.is_cuda):
        return False
    dtypes, rows = _CPU if x.is_cpu else _CUDA
    return (
        x.dtype in dtypes
        and not torch.is_grad_enabled()
        and not torch.compiler.is_compiling()
        and not (torch._C._is_any_autocast_enabled() and torch.is_autocast_enabled(x.device.type))
        and type(x) is Tensor
        and nn.Linear.forward is _FORWARD
        and nn.Linear.__call__ is _CALL
        and F.linear is _LINEAR
        and nothing_looks_on()
        and not torch._C._are_functorch_transforms_active()
        and forward_ad._current_level < 0
        and x.numel() <= rows * x.shape[-1]
    )


def nothing_looks_on() -> bool:
    """Whether there is no global forward hook, no tracer and no mode. These would miss the functions that a module's
    own forward calls."""
    return not (
        hooks._global_forward_hooks
        or hooks._global_forward_pre_hooks
        or torch._C._len_torch_dispatch_stack()
        or torch._C._get_tracing_state()
        or (torch._C._len_torch_function_stack() and _a_mode_looks_on())
    )


def _a_mode_looks_on() -> bool:
    """Whether a mode other than a default device is on. A default device only concerns functions that make tensors."""
    return not all(type(mode) is DeviceContext for mode in _get_current_function_mode_stack())


def unchanged(module: nn.Module | None, kind: type[nn.Module]) -> bool:
    """Whether a call of `module` runs the forward of `kind` and nothing of this module's own. `module` must not be of a
    subclass, and have no hook, no compiled form and no forward in the instance. Global hooks are not checked."""
    if type(module) is not kind:
        return False
    own = module.__dict__
    return not (
        own["_forward_hooks"]
        or own["_forward_pre_hooks"]
        or "forward" in own
        or "_call_impl" in own
        or own.get("_compiled_call_impl")
    )


def own_parameters(module: nn.Module | None, kind: type[nn.Module], x: Tensor) -> tuple[Tensor, Tensor | None] | None:
    """The weight and bias of a `module` that is :func:`unchanged`, if an op can read them beside x. They must be plain
    parameters, contiguous, with the dtype and device of x. Otherwise None."""
    if module is None or not unchanged(module, kind):
        return None
    own = module.__dict__["_parameters"]  # a module's attributes take ten times as long
    dtype, device = x.dtype, x.device
    for p in own.values():
        if p is not None and not (
            type(p) is nn.Parameter
            and p.dtype == dtype
            and p.device == device
            and p.layout == torch.strided
            and p.is_contiguous()
        ):
            return None
    weight, bias = own.get("weight"), own.get("bias")
    if weight is None or module.__dict__.get("bias") is not None:  # no parameter, as where torch prunes it
        return None
    return weight, bias


def only_weight(module: nn.Module, x: Tensor) -> Tensor | None:
    """The weight of a linear layer, if ``module(x)`` uses nothing else and an op may replace it. The layer must have
    :func:`own_parameters` without a bias. There must be no hooks, global ones and those of the backward included.
    Otherwise None."""
    own = own_parameters(module, nn.Linear, x)
    if own is None or own[1] is not None or nn.Linear.forward is not _FORWARD or F.linear is not _LINEAR:
        return None
    looked_at = module.__dict__["_backward_hooks"] or module.__dict__["_backward_pre_hooks"]
    if looked_at or hooks._global_forward_hooks or hooks._global_forward_pre_hooks or hooks._global_backward_hooks:
        return None
    return own[0]
