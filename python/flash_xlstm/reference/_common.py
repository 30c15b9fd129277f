"""What the references share."""

from __future__ import annotations

import torch


def wide(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which states, gates and sums of inputs of `dtype` are kept."""
    return torch.float64 if dtype == torch.float64 else torch.float32
