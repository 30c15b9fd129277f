"""Linear layers on few rows, as in decoding."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from flash_xlstm import ops

# By device: the dtypes and the most rows for which the op of this package takes the product.
_FEW_ROWS = {
    "cuda": ((torch.bfloat16,), 16),
    "cpu": ((torch.float32, torch.bfloat16, torch.float16), 4),
}


def linear(layer: nn.Module, x: Tensor) -> Tensor:
    """``layer(x)``; by :func:`flash_xlstm.ops.linear_rows` where `layer` is a plain linear layer, no gradient is needed
    and x has few rows."""
    if type(layer) is nn.Linear and _serves(layer, x):
        return ops.linear_rows(x, layer.weight, layer.bias, constant_weights=True)
    return layer(x)


def few_rows(x: Tensor) -> bool:
    """Whether products with x may go by :func:`flash_xlstm.ops.linear_rows`, as far as x and torch's modes go."""
    dtypes, rows = _FEW_ROWS.get(x.device.type, ((), 0))
    return (
        x.dtype in dtypes
        and x.numel() <= rows * x.shape[-1]
        and not torch.is_grad_enabled()
        and not torch.is_autocast_enabled(x.device.type)
        and not torch.compiler.is_compiling()
    )


def _serves(layer: nn.Linear, x: Tensor) -> bool:
    weight = layer.weight
    return (
        few_rows(x)
        and weight.dtype == x.dtype
        and weight.device == x.device
        and not (layer._forward_hooks or layer._forward_pre_hooks)
        and type(weight) is nn.Parameter
        and (x.device.type != "cuda" or (layer.in_features % 8 == 0 and weight.data_ptr() % 16 == 0))
    )
