"""What the op families share."""

from __future__ import annotations

import torch
from torch import Tensor

import flash_xlstm._build  # noqa: F401  (registers the operators)


def autocast(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Casts floating-point tensors to the autocast dtype of their device, where autocast is on."""
    device_type = tensors[0].device.type
    if not torch.is_autocast_enabled(device_type):
        return tensors
    dtype = torch.get_autocast_dtype(device_type)
    return tuple(t.to(dtype) if t.is_floating_point() else t for t in tensors)


def no_double_backward(op: str) -> None:
    """Makes differentiating the backward operator `op` raise: these ops have first derivatives only."""

    def backward(ctx, *grads):
        raise RuntimeError(f"flash_xlstm::{op} has no derivative: double backward is not supported")

    torch.library.register_autograd(f"flash_xlstm::{op}", backward)
