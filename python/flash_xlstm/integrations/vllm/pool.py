"""The mLSTM on states that lie in slots of a pool."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from flash_xlstm import ops

State = tuple[Tensor, Tensor, Tensor]


def step(q: Tensor, k: Tensor, v: Tensor, i: Tensor, f: Tensor, state: State, slots: Tensor, options: Any) -> Tensor:
    """One token of each row; the pool is updated in place. -1 leaves a row out."""
    rows = slots.clamp(min=0).long()
    kept = slots >= 0
    own = tuple(t[rows].contiguous() for t in state)
    h = ops.mlstm_step(q, k, v, i, f, own, **options)
    for pool, new in zip(state, own, strict=True):
        pool[rows[kept]] = new[kept]
    return h * kept[:, None, None]


def prefill(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    i: Tensor,
    f: Tensor,
    state: State,
    slots: Tensor,
    cu_seqlens: Tensor,
    fresh: Tensor,
    options: Any,
) -> Tensor:
    """Packed sequences; each continues from its slot, or from zeros, and leaves its state there."""
    rows = slots.clamp(min=0).long()
    kept = slots >= 0
    first = tuple(
        torch.where(fresh.view(-1, *[1] * (t.dim() - 1)), torch.zeros((), dtype=t.dtype), t[rows]).contiguous()
        for t in state
    )
    h, last = ops.mlstm(q, k, v, i, f, initial_state=first, cu_seqlens=cu_seqlens, return_final_state=True, **options)
    for pool, new in zip(state, last, strict=True):
        pool[rows[kept]] = new[kept].to(pool.dtype)
    return h
