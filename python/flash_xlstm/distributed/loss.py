"""The loss of a language model's head that is split by the vocabulary."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from flash_xlstm.ops import _common
from flash_xlstm.ops import loss as whole

_REDUCTIONS = ("mean", "sum")


def vocabulary_parallel_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    group: dist.ProcessGroup,
    *,
    soft_cap: float | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
) -> Tensor:
    """:func:`flash_xlstm.ops.linear_cross_entropy` of a weight whose rows are split over ranks: rank r has rows
    ``r * size`` up to ``(r + 1) * size``.

    Logits are made in pieces, and their gradients along with the loss. Of each piece two numbers a token are exchanged
    besides its largest logit; of all, once, the gradient of `hidden`.

    Args:
        hidden: (..., dim), the same on every rank; float32, bfloat16 or float16.
        weight: (size, dim), this rank's part, of as many rows on every rank; dtype of `hidden`, or float32, of which
            the gradient is then not rounded.
        labels: (...), the same on every rank; from 0 up to the whole vocabulary, or `ignore_index`.
        group: the ranks.
        soft_cap, ignore_index: as of the whole's.
        reduction: "mean" or "sum".

    Returns:
        The loss, float32, (), the same on every rank. Differentiable in hidden and weight, once.

    Raises:
        ValueError, TypeError: an argument of the wrong shape, dtype, device or value, by its name.
        RuntimeError: on CUDA, labels out of range: a device-side assertion.
    """
    (hidden,) = _common.autocast(hidden)
    if weight.dtype != torch.float32:
        (weight,) = _common.autocast(weight)
    if reduction not in _REDUCTIONS:
        raise ValueError(f"reduction is {reduction!r:.80}; it must be one of {', '.join(_REDUCTIONS)}")
    if soft_cap is not None and not 0 < soft_cap < float("inf"):
        raise ValueError(f"soft_cap is {soft_cap}; it must be finite and greater than 0, or None")
    vocabulary = weight.shape[0] * dist.get_world_size(group) if weight.dim() == 2 else 0
    whole._check(hidden, weight, labels, ignore_index, reduction, vocabulary)
    return _CrossEntropy.apply(
        hidden, weight, labels, group, soft_cap, ignore_index, reduction == "mean", torch.is_grad_enabled()
    )


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    @whole._without_autocast
    def forward(ctx, hidden, weight, labels, group, soft_cap, ignore_index, mean, gradients):
        of_hidden, of_weight = (gradients and need for need in ctx.needs_input_grad[:2])
        x, flat = hidden.reshape(-1, hidden.shape[-1]), labels.reshape(-1)
        counts = flat != ignore_index
        dtype, product_weight = x.dtype, weight.to(x.dtype).contiguous()
        if not x.is_cuda:  # as in the whole's: torch's product of 16 bits has no float32 result there
            x, product_weight = x.float(), product_weight.float()
        mine = flat - dist.get_rank(group) * weight.shape[0]
        has = (mine >= 0) & (mine < weight.shape[0]) & counts
        mine = torch.where(has, mine, 0).long()
        dhidden: Any = torch.empty_like(x, dtype=dtype) if of_hidden else None
        dweight = torch.zeros_like(weight, dtype=torch.float32) if of_weight else None
        total = x.new_zeros((), dtype=torch.float32)
        piece = whole._pieces(max(len(x), 1), weight.shape[0])[0]
        for start in range(0, len(x), piece):
            part = slice(start, start + piece)
            logits = whole._rows(x, len(x[part]), weight.shape[0], torch.float32)
            whole._product(x[part], product_weight.t(), logits)
            loss, dlogits = _piece(
                logits, mine[part], has[part], counts[part], group, soft_cap, of_hidden or of_weight
            )  # fmt: skip
            total += loss
            if dlogits is None:
                continue
            dlogits = dlogits.to(x.dtype)
            if of_hidden:
                dhidden[part] = dlogits @ product_weight
            if of_weight:
                whole._product(dlogits.t(), x[part], dweight, add=True)
        if of_hidden:
            dist.all_reduce(dhidden, group=group)
        count = counts.sum().float() if mean else None
        ctx.shape, ctx.dtype = hidden.shape, weight.dtype
        ctx.save_for_backward(dhidden, dweight, count)
        return total if count is None else total / count

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dloss: Tensor) -> Any:
        dhidden, dweight, count = ctx.saved_tensors
        factor = dloss if count is None else dloss / count
        dhidden = None if dhidden is None else (dhidden * factor).to(dhidden.dtype).view(ctx.shape)
        dweight = None if dweight is None else (dweight * factor).to(ctx.dtype)
        return dhidden, dweight, *(None,) * 6


def _piece(
    logits: Tensor, mine: Tensor, has: Tensor, counts: Tensor, group: Any, soft_cap: float | None, gradients: bool
) -> tuple[Tensor, Tensor | None]:
    """The sum of a piece's losses, and the gradient of this rank's logits.

    Args:
        logits: (tokens, size) float32, this rank's, without the cap.
        mine: (tokens,) the label's column here, or 0 where `has` is false.
        counts: (tokens,) whether there is a loss.
    """
    if soft_cap is not None:
        logits = soft_cap * torch.tanh(logits / soft_cap)
    largest = logits.amax(-1)
    dist.all_reduce(largest, dist.ReduceOp.MAX, group=group)
    shares = torch.exp(logits - largest[:, None])
    label = logits.gather(1, mine[:, None])[:, 0]
    sums = torch.stack((shares.sum(-1), torch.where(has, label - largest, 0.0)))
    dist.all_reduce(sums, group=group)
    loss = torch.where(counts, sums[0].log() - sums[1], 0.0).sum()
    if not gradients:
        return loss, None
    shares /= sums[0, :, None]
    shares.scatter_add_(1, mine[:, None], -has.float()[:, None])
    shares.masked_fill_(~counts[:, None], 0.0)
    if soft_cap is not None:
        shares *= 1 - (logits / soft_cap) ** 2
    return loss, shares
