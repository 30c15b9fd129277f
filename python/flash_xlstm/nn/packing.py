"""Sequences, and rows that hold padding, or several sequences one after the other. Offsets say where each of these
begins."""

from __future__ import annotations

import torch
from torch import Tensor


def check_sequence(name: str, x: Tensor, width: int, *, step: bool) -> None:
    """Raises ValueError unless x is (batch, seq, width) with seq at least 1; seq must be 1 for a `step`."""
    if x.dim() == 3 and x.shape[2] == width and (x.shape[1] == 1 if step else x.shape[1] > 0):
        return
    wanted = f"it must be (batch, seq, {width}), seq at least 1"
    if step:
        wanted = (
            f"a step takes one token of each row, (batch, 1, {width}); for several call forward with "
            "return_last_state=True"
        )
    raise ValueError(f"{name} has shape {tuple(x.shape)}; {wanted}")


def require(holds: Tensor, message: str, wait: bool = True) -> None:
    """Raises a ValueError unless `holds`, one bool, is true. Under a compiler, and on CUDA with `wait` false,
    the device raises a RuntimeError instead. A meta tensor is not checked."""
    if torch._C._are_functorch_transforms_active():
        holds = unwrapped(holds).all()
    if torch.compiler.is_compiling() or (holds.is_cuda and not wait):
        torch._assert_async(holds, message)
    elif not holds.is_meta and not holds:
        raise ValueError(message)


def unwrapped(t: Tensor) -> Tensor:
    """The values of `t` under transforms of torch.func: with vmap, those of all that it maps over."""
    while torch._C._functorch.is_functorch_wrapped_tensor(t):
        t = torch._C._functorch.get_unwrapped(t)
    return t


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


def check_packed(x: Tensor, cu_seqlens: Tensor) -> None:
    """Checks the offsets of sequences that are packed into x, (1, seq, ...), as :func:`check_offsets`."""
    if x.shape[0] != 1:
        raise ValueError(f"x has batch {x.shape[0]}; with cu_seqlens it must be 1")
    check_offsets("cu_seqlens", cu_seqlens, x.shape[1])


def sequence_of_tokens(cu_seqlens: Tensor, tokens: int) -> Tensor:
    """(tokens,): the number of the packed sequence that each token is of."""
    places = torch.arange(tokens, device=cu_seqlens.device)
    return torch.searchsorted(cu_seqlens[1:].long(), places, right=True).clamp(max=cu_seqlens.shape[0] - 2)


def check_padding(padding: Tensor, x: Tensor, cu_seqlens: Tensor | None = None) -> None:
    """Checks that `padding` is (batch, seq) bool beside x (batch, seq, ...) and, unless None, beside no offsets."""
    if not isinstance(padding, Tensor):
        raise TypeError(f"padding is a {type(padding).__name__}; it must be a tensor")
    if padding.dtype != torch.bool:
        raise TypeError(
            f"padding has dtype {str(padding.dtype)[6:]}; it must be bool, True at padding, as attention_mask == 0 is"
        )
    if padding.shape != x.shape[:2]:
        raise ValueError(f"padding has shape {tuple(padding.shape)}; it must be that of x, {tuple(x.shape[:2])}")
    if padding.device != x.device:
        raise ValueError(f"padding is on {padding.device}; it must be on the device of x, {x.device}")
    if cu_seqlens is not None:
        raise ValueError("padding is given beside cu_seqlens; one of them must be None: pack padding as a sequence")


def tokens_between(padding: Tensor) -> tuple[Tensor, Tensor]:
    """For each row of `padding` (batch, seq) the place of its first token and the number of tokens, (batch, 1) each. A
    row of padding has 0 tokens at 0. Raises a ValueError, on CUDA the device raises, if padding is between tokens."""
    tokens, places = ~padding, torch.arange(padding.shape[1], device=padding.device)
    first, count = tokens.byte().argmax(1, keepdim=True), tokens.sum(1, keepdim=True)
    adjacent = tokens == ((places >= first) & (places < first + count))
    require(adjacent.all(), "padding must be on the left and on the right of a row's tokens, not between them", False)
    return first, count


def closed(i: Tensor, f: Tensor, padding: Tensor | None) -> tuple[Tensor, Tensor]:
    """The pre-activations of the input and forget gates, (batch, seq, heads), such that padding leaves the state alone.
    The kernels' soft cap keeps infinities. Gradients are 0 there. Raises as :func:`check_padding`."""
    if padding is None:
        return i, f
    check_padding(padding, i)
    return i.masked_fill(padding[..., None], -torch.inf), f.masked_fill(padding[..., None], torch.inf)


def refuse_step(inplace: bool, cu_seqlens: Tensor | None) -> None:
    if inplace and cu_seqlens is not None:
        raise ValueError("cu_seqlens is given, but a step takes one token of each row: it must be None")
