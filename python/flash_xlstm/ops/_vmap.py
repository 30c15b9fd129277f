"""The operators under :func:`torch.func.vmap`: one call for all that it maps over, where there is such a call.

What vmap maps over joins a dimension whose entries do not see each other: the batch, or the heads (of the convolution,
the channels), which have parameters of their own. Else the operator is called once for each entry.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import flash_xlstm.ops.loss  # noqa: F401  (its operators are defined in Python)

_SAME = None  # the same for all that vmap maps over
_ABSENT = "absent"  # must be None
_FIRST = "first"  # a new first dimension
_Dims = tuple[Any, ...]  # for each tensor among the arguments, or the results, the dimension that vmap's joins

_QKVIF = (2, 2, 2, 2, 2)
_CNM = (1, 1, 1)
# For each operator, ways to join: the dimensions of arguments, then those of results.
_WAYS: dict[str, list[tuple[_Dims, _Dims]]] = {
    "mlstm": [
        ((0,) * 8 + (_ABSENT,), (0, 1, 0, 0, 0)),
        ((*_QKVIF, *_CNM, _SAME), (2, 3, *_CNM)),
    ],
    "mlstm_backward": [
        ((0,) * 12 + (_ABSENT, 0, 1), (0,) * 8),
        ((2, *_CNM, *_QKVIF, *_CNM, _SAME, 2, 3), (*_QKVIF, *_CNM)),
    ],
    "mlstm_sig": [
        ((0,) * 7 + (_ABSENT,), (0,) * 4),
        ((*_QKVIF, 1, 1, _SAME), (2, 2, 1, 1)),
    ],
    "mlstm_sig_backward": [
        ((0,) * 10 + (_ABSENT, 0, 0), (0,) * 7),
        ((2, 1, 1, *_QKVIF, 1, 1, _SAME, 2, 2), (*_QKVIF, 1, 1)),
    ],
    "mlstm_state": [
        ((0,) * 4 + (_ABSENT,), (0,) * 4),
        ((2, 2, 2, 2, _SAME), (*_CNM, 1)),
    ],
    "mlstm_state_backward": [
        ((0,) * 8 + (_ABSENT,), (0,) * 4),
        ((*_CNM, 1, 2, 2, 2, 2, _SAME), (2,) * 4),
    ],
    "mlstm_gated": [((0, 0, 0, _SAME, _ABSENT), (0, 0, 1))],
    "slstm": [
        ((0, _SAME, _SAME, 0, 0, 0, 0, _ABSENT), (0,) * 6),
        ((3, 1, 1, 1, 1, 1, 1, _SAME), (2, 2, 1, 1, 1, 1)),
    ],
    "slstm_backward": [((2, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, _SAME, 2, 2), (3, 1, 1, 1, 1, 1, 1))],
    "causal_conv1d": [
        ((0, _SAME, _SAME, 0, _ABSENT), (0, 0)),
        ((2, 0, 0, 2, _SAME), (2, 2)),
    ],
    "causal_conv1d_backward": [((2, 2, 2, 0, 0, 2, _SAME), (2, 0, 0, 2))],
    "rms_norm": [((_FIRST, _SAME), (_FIRST,))],
    "add_rms_norm": [((_FIRST, _FIRST, _SAME), (_FIRST, _FIRST))],
    "gated_head_norm": [((_FIRST, _FIRST, _SAME), (_FIRST,))],
    "swiglu": [((_FIRST, _FIRST), (_FIRST,))],
    "swiglu_backward": [((_FIRST, _FIRST, _FIRST), (_FIRST, _FIRST))],
    "swiglu_joined": [((_FIRST,), (_FIRST,))],
    "soft_cap": [((_FIRST,), (_FIRST,))],
    "soft_cap_backward": [((_FIRST, _FIRST), (_FIRST,))],
}
# Operators that are called for each entry. Those with a weight sum its gradient over all rows.
_ONE_BY_ONE = (
    "mlstm_gated_backward", "rms_norm_backward", "gated_head_norm_backward", "swiglu_joined_backward",
    "joined_product", "added_product", "swiglu_product", "swiglu_product_backward",
    "linear_cross_entropy", "linear_cross_entropy_backward", "linear_cross_entropies_backward",
)  # fmt: skip


def _fits(dims: _Dims, args: tuple[Any, ...], mapped: tuple[int | None, ...]) -> bool:
    return all(
        (arg is None) if dim == _ABSENT else (at is None or dim is not _SAME)
        for dim, arg, at in zip(dims, args, mapped, strict=False)
    )


def _joined(t: Tensor, at: int | None, dim: Any, count: int) -> Tensor:
    """`t` with the dimension `at`, of vmap, in front of `dim` and joined with it. Without one `t` is repeated."""
    if dim is _SAME:
        return t
    place = 0 if dim == _FIRST else dim
    t = t.movedim(at, place) if at is not None else t.unsqueeze(place).expand(*t.shape[:place], count, *t.shape[place:])
    if dim != _FIRST:
        t = t.reshape(*t.shape[:place], count * t.shape[place + 1], *t.shape[place + 2 :])
    return _readable(t)


def _entry(t: Any, at: Any, n: int) -> Any:
    if isinstance(t, (list, tuple)) and isinstance(at, (list, tuple)):
        return [_entry(each, place, n) for each, place in zip(t, at, strict=True)]
    return t if at is None else _readable(t.select(at, n))


def _readable(t: Tensor) -> Tensor:
    """`t`, copied where its last dimension is not contiguous: vmap's dimension may lie behind it."""
    return t if t.dim() == 0 or t.stride(-1) == 1 else t.contiguous()


def _parted(t: Tensor, dim: Any, count: int) -> Tensor:
    return t if dim == _FIRST else t.reshape(*t.shape[:dim], count, t.shape[dim] // count, *t.shape[dim + 1 :])


def _rule(op: Any, ways: list[tuple[_Dims, _Dims]]) -> Any:
    names = [argument.name for argument in op._schema.arguments]

    def run(info: Any, mapped: tuple[int | None, ...], *args: Any) -> Any:
        count = info.batch_size
        if count == 0:
            raise ValueError(f"vmap maps over 0 entries of an argument of {op._schema.name}; it must be at least 1")
        # What is kept with states has one dimension, and none of vmap's.
        if ways and names[-1] == "keep_states":
            args = (*args[: len(names) - 1], False)
        joins = "kept" not in names or args[names.index("kept")].dim() > 1
        for dims, result_dims in ways if joins else []:
            if _fits(dims, args, mapped):
                tensors = len(dims)
                given = [
                    _joined(arg, at, dim, count) if isinstance(arg, Tensor) else arg
                    for arg, at, dim in zip(args[:tensors], mapped, dims, strict=False)
                ]
                results = op(*given, *args[tensors:])
                if isinstance(results, Tensor):
                    return _parted(results, result_dims[0], count), 0 if result_dims[0] == _FIRST else result_dims[0]
                parts = tuple(_parted(t, dim, count) for t, dim in zip(results, result_dims, strict=True))
                return parts, tuple(0 if dim == _FIRST else dim for dim in result_dims)
        entries = [op(*(_entry(arg, at, n) for arg, at in zip(args, mapped, strict=True))) for n in range(count)]
        if isinstance(entries[0], Tensor):
            return torch.stack(entries), 0
        return tuple(map(torch.stack, zip(*entries, strict=True))), (0,) * len(entries[0])

    return run


for _name in (*_WAYS, *_ONE_BY_ONE):
    _op = getattr(torch.ops.flash_xlstm, _name).default
    torch.library.register_vmap(f"flash_xlstm::{_name}", _rule(_op, _WAYS.get(_name, [])))
