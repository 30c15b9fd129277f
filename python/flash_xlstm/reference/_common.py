"""Helpers that the references share."""

from __future__ import annotations

import torch


def wide(dtype: torch.dtype) -> torch.dtype:
    """The dtype of states, gates and sums for inputs of `dtype`."""
    return torch.float64 if dtype == torch.float64 else torch.float32
