"""Conversion of a layer's states to the form that its op takes."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from flash_xlstm.ops._common import unpack_state

State = tuple[Tensor, Tensor, Tensor]


def fitting_state(state: State, q: Tensor, *, written: bool = False) -> State:
    """`state` in the form that kernels take with q: on the device of q, in float32, or in float64 if q is float64. A
    bfloat16 c is kept. Tensors that fit are not copied; `written` is as in :func:`fitting`."""
    parts = unpack_state("state", state)
    wide = torch.promote_types(q.dtype, torch.float32)
    c_dtype = torch.bfloat16 if parts[0] is not None and parts[0].dtype == torch.bfloat16 else wide
    c, n, m = fitting(parts, q, (c_dtype, wide, wide), written=written)
    return c, n, m


def has_slots(t: Tensor) -> bool:
    """Whether an op may update the slots of `t`, those of its first dimension, in place: each is contiguous, and they
    lie apart. :meth:`Tensor.is_contiguous` is a faster test for most states."""
    return t.is_contiguous() or (t.shape[0] > 0 and t[0].is_contiguous() and t.stride(0) >= t[0].numel())


def fitting(state: Iterable[Any], x: Tensor, dtypes: Iterable[torch.dtype], *, written: bool) -> list[Any]:
    """The tensors of `state`, or None, in `dtypes` and on the device of x. With `written` an op may write them. Tensors
    that fit are not copied."""
    device = x.device
    # Only inference mode may write a tensor that was created in it.
    look = written and not torch.compiler.is_compiling() and not torch.is_inference_mode_enabled()
    return [
        t
        if t is None
        or (
            t.dtype == dtype
            and t.device == device
            and not (written and not t.is_contiguous())
            and not (look and t.is_inference())
        )
        else t.to(device, dtype, copy=True, memory_format=torch.contiguous_format)
        for t, dtype in zip(state, dtypes, strict=True)
    ]
