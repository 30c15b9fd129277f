"""States of layers: conversion to the form that an op takes, cutting from their history, fresh rows."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from flash_xlstm.ops._common import unpack_state

State = tuple[Tensor, Tensor, Tensor]


def detach_state(state: Any) -> Any:
    """`state` without its history, for truncated backpropagation through time: the next gradients end there.

    Args:
        state: of a layer, a block or a stack: tensors in any nesting of tuples, lists and dicts.

    Returns:
        The same nesting, of tensors that share the memory of the given ones.
    """
    return pytree.tree_map_only(Tensor, Tensor.detach, state)


def reset_rows(state: Any, rows: Tensor | Sequence[int]) -> Any:
    """`state` with some rows as before their first token. Gradients go through the other rows.

    Args:
        state: of a layer, a block or a stack: tensors (batch, ...) in any nesting of tuples, lists and dicts.
        rows: numbers of rows, from 0 to batch - 1, or (batch,) bool, True at those rows. Nothing waits for a GPU:
            wrong numbers there are a device-side assertion.

    Returns:
        The same nesting, of new tensors.

    Raises:
        TypeError, ValueError: `rows` is not as above.
    """
    first = next((t for t in pytree.tree_leaves(state) if isinstance(t, Tensor)), None)
    if first is None:
        raise TypeError(f"state is a {type(state).__name__} without tensors; it must be a layer's, block's or stack's")
    rows = checked_rows(rows, first)
    return pytree.tree_map_only(Tensor, lambda t: fresh_rows(t, rows), state)


def checked_rows(rows: Tensor | Sequence[int], t: Tensor, name: str = "rows") -> Tensor:
    """`rows` as :func:`reset_rows` takes them, as a tensor on the device of `t` (batch, ...), int64 or bool. `name` is
    the argument's."""
    try:
        given = rows if isinstance(rows, Tensor) else torch.tensor(rows, dtype=None if len(rows) else torch.int64)
    except (TypeError, ValueError, RuntimeError):
        raise TypeError(f"{name} is {rows!r}; it must be a sequence of numbers of rows or of bool") from None
    batch, bools = t.shape[0], given.dtype == torch.bool
    if given.dtype.is_floating_point or given.dtype.is_complex:
        raise TypeError(f"{name} has dtype {str(given.dtype)[6:]}; it must be numbers of rows, or bool for each row")
    if given.dim() != 1 or (bools and given.shape[0] != batch):
        raise ValueError(f"{name} has shape {tuple(given.shape)}; it must be 1-D, and ({batch},) if it is bool")
    # A compiler has no values to look at.
    if not bools and given.device.type == "cpu" and given.numel() and not torch.compiler.is_compiling():
        least, most = given.aminmax()
        if least < 0 or most >= batch:
            raise ValueError(f"{name} holds {int(least if least < 0 else most)}; they must be from 0 to {batch - 1}")
    return given.to(t.device, None if bools else torch.int64)


def fresh_rows(t: Tensor, rows: Tensor, *, inplace: bool = False) -> Tensor:
    """`t` (batch, ...) with zeros, what every fresh state is, in `rows`, of :func:`checked_rows`."""
    rows = rows.to(t.device)
    if rows.dtype == torch.bool:
        rows = rows.view(-1, *[1] * (t.dim() - 1))
        return t.masked_fill_(rows, 0) if inplace else t.masked_fill(rows, 0)
    return t.index_fill_(0, rows, 0) if inplace else t.index_fill(0, rows, 0)


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
