"""The plain PyTorch form of the loss."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from flash_xlstm.reference.pointwise import soft_cap as capped

__all__ = ["linear_cross_entropy"]


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    soft_cap: float | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
) -> Tensor:
    """The cross entropy of ``soft_cap(hidden weight^T)``, as :func:`flash_xlstm.ops.linear_cross_entropy`: in float32
    (float64 for float64), with all logits at once."""
    hidden, weight = (t if t.dtype.itemsize == 8 else t.float() for t in (hidden, weight))
    logits, flat = capped(hidden @ weight.T, soft_cap).flatten(0, -2), labels.flatten().long()
    losses = F.cross_entropy(logits, flat, ignore_index=ignore_index, reduction="none", label_smoothing=label_smoothing)
    counts = flat != ignore_index
    if z_loss:
        losses = losses + counts * z_loss * logits.logsumexp(-1).square()
    if reduction == "none":
        return losses.view(labels.shape)
    return losses.sum() / counts.sum() if reduction == "mean" else losses.sum()
