"""Checks of sequences that are packed one after the other into one row. Offsets say where each begins."""

from __future__ import annotations

import torch
from torch import Tensor


def require(holds: Tensor, message: str, wait: bool = True) -> None:
    """Raises a ValueError unless `holds`, one bool, is true. Under a compiler, and on CUDA with `wait` false,
    the device raises a RuntimeError instead. A meta tensor is not checked."""
    if torch.compiler.is_compiling() or (holds.is_cuda and not wait):
        torch._assert_async(holds, message)
    elif not holds.is_meta and not holds:
        raise ValueError(message)


def check_offsets(name: str, offsets: Tensor, tokens: int) -> None:
    """Checks offsets (num_seqs + 1,) of packed sequences, without waiting for a GPU. They must begin with 0, never
    decrease, and end with `tokens`."""
    if not isinstance(offsets, Tensor):
        raise TypeError(f"{name} is a {type(offsets).__name__}; it must be a tensor")
    if offsets.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"{name} has dtype {str(offsets.dtype)[6:]}; it must be int32")
    if offsets.dim() != 1 or offsets.shape[0] < 2:
        raise ValueError(f"{name} has shape {tuple(offsets.shape)}; it must be (number of sequences + 1,)")
    what = f"{name} must begin with 0, never decrease, and end with the number of tokens"
    if not torch.compiler.is_compiling():  # a compiler would make a program for each number
        what += f", {tokens}"
    require((offsets[0] == 0) & (offsets[-1] == tokens) & (offsets.diff() >= 0).all(), what, wait=False)


def refuse_step(inplace: bool, cu_seqlens: Tensor | None) -> None:
    if inplace and cu_seqlens is not None:
        raise ValueError("cu_seqlens is given, but a step takes one token of each row: it must be None")
