"""Documents packed into rows. Their offsets are found from any of the arguments by which collators describe them."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from flash_xlstm.nn.packing import check_offsets, require, unwrapped

_OFFSETS = ("cu_seq_lens_q", "cu_seq_lens_k", "cu_seqlens")
_LENGTHS = ("max_length_q", "max_length_k")
ARGUMENTS = ("seq_idx", *_OFFSETS, *_LENGTHS)

_Check = tuple[Tensor, str]  # the number of violations, and the message of the error if there are any


def offsets(
    arguments: dict[str, Any], position_ids: Tensor | None, mask: Tensor | None, padding: Tensor | None, x: Tensor
) -> Tensor | None:
    """The offsets of documents in the tokens of x (batch, seq, ...), one row after the other.

    Args:
        arguments: the model's arguments, which may include some of `ARGUMENTS`.
        position_ids: positions, which begin anew with each document, or None.
        mask: (batch, seq): 0 at padding, and elsewhere 1, True or the number of the document; or None.
        padding: (batch, seq) bool on the device of x, True where the mask is 0; or None.

    Returns:
        (num_documents + 1,) int32 on the device of x, or None if each row is one document.

    Raises:
        TypeError, ValueError: an argument is of the wrong kind, or arguments contradict each other. Where offsets are
            given nothing waits for a GPU; the device raises for wrong values.
    """
    given = {name: arguments[name] for name in ARGUMENTS if arguments.get(name) is not None}
    if mask is not None and not _may_number_documents(mask, alone=not given and position_ids is None):
        check_mask(mask)
        mask = None
    if not given and position_ids is None and mask is None:
        return None

    batch, seq = x.shape[:2]
    bounds = _given_offsets(given, batch * seq, x.device)
    with_others = position_ids is not None or "seq_idx" in given or mask is not None
    if bounds is not None and batch == 1 and not with_others:
        return bounds
    last = None if padding is None else _last_tokens(padding)
    starts: dict[str, Tensor] = {}  # for each argument, where it says that documents begin, as _changes gives it
    checks: list[_Check] = []
    if bounds is not None:
        name, first = next(name for name in _OFFSETS if name in given), first_tokens(bounds, batch, seq)
        numbers = first if last is None else first.flatten().cumsum(0).view(batch, seq)
        starts[name] = first[:, 1:] if last is None else _changes(numbers, last)
        checks.append(((~first[:, 0]).sum(), f"{name} must hold where each row begins, of several"))
    if position_ids is not None:
        positions = _whole_numbers("position_ids", position_ids, x)
        counted = torch.arange(seq, device=x.device) if padding is None else (~padding).cumsum(1) - 1
        begin = _filled(positions - counted, last)  # the same for every token of a document
        starts["position_ids"] = _changes(begin, None)
        elsewhere = (positions[:, 1:] != 0) & (positions[:, 1:] != begin[:, :1])
        checks.append((
            (starts["position_ids"] & elsewhere).sum(),
            "position_ids must count up by one from token to token, or begin anew at 0 where a document begins",
        ))  # fmt: skip
    if "seq_idx" in given:
        numbers = _whole_numbers("seq_idx", given["seq_idx"], x)
        starts["seq_idx"] = _changes(numbers, last)
        checks.append(_once("seq_idx", numbers, starts["seq_idx"], last))
    if mask is not None:
        numbers = mask.to(x.device)
        documents = _changes(numbers, last)
        checks.append(((numbers < 0).sum(), "attention_mask must not be less than 0"))
        checks.append(_once("attention_mask", numbers, documents, last))
        for found in starts.values():  # beside other arguments, a mask of 0 and 1 says nothing of documents
            documents = torch.where((numbers > 1).any(), documents, found)
            break
        starts["attention_mask"] = documents

    (name, found), *others = starts.items()
    for other, also in others:
        checks.append(((also != found).sum(), f"{other} must tell the same documents as {name}"))
    if bounds is None and (not torch.compiler.is_compiling() or "seq_idx" in given):
        return _found_offsets(found, checks)
    if bounds is None:
        checks.append((
            found.sum(),
            "position_ids must count up by one from token to token under torch.compile; documents packed into rows are "
            "told there by cu_seq_lens_q",
        ))  # fmt: skip
    for violations, message in checks:
        require(violations == 0, message, wait=False)
    return bounds


def first_tokens(offsets: Tensor, batch: int, seq: int) -> Tensor:
    """(batch, seq) bool: whether a document begins with the token."""
    first = torch.zeros(batch * seq + 1, dtype=torch.bool, device=offsets.device)
    return first.index_fill_(0, offsets.long().clamp(0, batch * seq), True)[:-1].view(batch, seq)


def check_mask(mask: Tensor) -> None:
    """Checks that a mask only tells tokens from padding, without waiting for a GPU."""
    if mask.dtype != torch.bool:
        require(
            ((mask == 0) | (mask == 1)).all(),
            "attention_mask holds other values than 1, where there is a token, and 0; numbers of documents are taken "
            "without a cache, beside seq_idx on CUDA, beside cu_seq_lens_q under torch.compile",
            wait=False,
        )


def _may_number_documents(mask: Tensor, alone: bool) -> bool:
    if mask.dtype == torch.bool or mask.dtype.is_floating_point:
        return False
    if not alone:
        return True
    # The values are read only where that is free.
    return mask.device.type == "cpu" and not torch.compiler.is_compiling() and bool((unwrapped(mask) > 1).any())


def _given_offsets(given: dict[str, Any], tokens: int, device: torch.device) -> Tensor | None:
    names = [name for name in _OFFSETS if name in given]
    lengths = [name for name in _LENGTHS if name in given]
    if not names:
        if lengths:
            raise ValueError(f"{lengths[0]} is given without cu_seq_lens_q, which tells where documents begin")
        return None
    bounds = given[names[0]]
    check_offsets(names[0], bounds, tokens)
    for name in names[1:]:
        if given[name] is bounds:
            continue
        check_offsets(name, given[name], tokens)
        message = f"{name} must be equal to {names[0]}"
        if given[name].shape != bounds.shape:
            raise ValueError(f"{message}; their shapes are {tuple(given[name].shape)} and {tuple(bounds.shape)}")
        require((given[name].to(bounds.device) == bounds).all(), message, wait=False)
    for name in lengths:
        length = given[name]
        if isinstance(length, Tensor):
            length = length.to(bounds.device)
        elif isinstance(length, bool) or not isinstance(length, (int, torch.SymInt)):
            raise TypeError(f"{name} is a {type(length).__name__}; it must be a whole number")
        message = f"{name} must be at least the length of the longest document that {names[0]} tells"
        require((bounds.diff() <= length).all(), message, wait=False)
    return bounds.to(device, torch.int32, non_blocking=True).contiguous()


@torch.compiler.disable(reason="give cu_seq_lens_q beside seq_idx: the number of documents is not known otherwise")
def _found_offsets(starts: Tensor, checks: list[_Check]) -> Tensor | None:
    """The offsets that `starts` gives, or None if each row is one document. Raises for violated checks. This waits for
    a GPU, once."""
    if starts.is_meta:
        return None
    within, *violations = torch.stack([starts.sum(), *(count for count, _ in checks)]).tolist()
    for count, (_, message) in zip(violations, checks, strict=True):
        if count:
            raise ValueError(message)
    if within == 0:
        return None
    batch, seq = starts.shape[0], starts.shape[1] + 1
    tokens, options = batch * seq, {"dtype": torch.int32, "device": starts.device}
    document = F.pad(starts, (1, 0), value=True).flatten().cumsum(0) - 1
    bounds = torch.full((batch + within + 1,), tokens, **options)
    return bounds.scatter_reduce_(0, document, torch.arange(tokens, **options), "amin")


def _whole_numbers(name: str, numbers: Tensor, x: Tensor) -> Tensor:
    """`numbers` as (batch, seq), on the device of x."""
    batch, seq = x.shape[:2]
    if not isinstance(numbers, Tensor):
        raise TypeError(f"{name} is a {type(numbers).__name__}; it must be a tensor")
    if numbers.dtype == torch.bool or numbers.dtype.is_floating_point:
        raise TypeError(f"{name} has dtype {str(numbers.dtype)[6:]}; it must be int64 or int32")
    if numbers.dim() != 2 or numbers.shape[0] not in (1, batch) or numbers.shape[1] != seq:
        raise ValueError(f"{name} has shape {tuple(numbers.shape)}; it must be ({batch}, {seq})")
    return numbers.to(x.device).expand(batch, seq)


def _last_tokens(padding: Tensor) -> Tensor:
    """(batch, seq): for each position, the last position at or before it that holds a token. Positions before the first
    token get that of the first token."""
    places = torch.arange(padding.shape[1], device=padding.device).masked_fill(padding, -1)
    return torch.maximum(places.cummax(1).values, (~padding).byte().argmax(1, keepdim=True))


def _filled(numbers: Tensor, last: Tensor | None) -> Tensor:
    """`numbers`, where padding has the number of the token that `last`, of :func:`_last_tokens`, gives."""
    return numbers if last is None else numbers.gather(1, last)


def _changes(numbers: Tensor, last: Tensor | None) -> Tensor:
    """(batch, seq - 1) bool: whether the number of a row's token differs from that of the token before."""
    numbers = _filled(numbers, last)
    return numbers[:, 1:] != numbers[:, :-1]


def _once(name: str, numbers: Tensor, changes: Tensor, last: Tensor | None) -> _Check:
    """The check that no number of a row comes back after another number."""
    distinct = _changes(_filled(numbers, last).sort(1).values, None)
    again = distinct.sum(1) != changes.sum(1)
    return again.sum(), f"{name} must not come back to a number after another one in a row"
