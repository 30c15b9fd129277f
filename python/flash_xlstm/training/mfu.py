"""Model FLOPs utilization: the share of a device's peak that training reaches."""

from __future__ import annotations

import re

import torch
from torch import nn

# Dense bfloat16 FLOP/s with float32 accumulation, by the name of the device. The source is NVIDIA's data sheet of each
# GPU, and for GeForce and RTX cards the white papers of GA102 and AD102. Figures with sparsity are halved.
PEAKS = (
    (r"B200", 2250e12),
    (r"H200|GH200 \w+|H100 80GB HBM3", 989.4e12),
    (r"H100 NVL|H200 NVL", 835.5e12),
    (r"H100 PCIe", 756e12),
    (r"A100[-\w ]*", 312e12),
    (r"L40S", 362e12),
    (r"A30", 165e12),
    (r"A10", 125e12),
    (r"L4", 121e12),
    (r"GeForce RTX 4090", 165.2e12),
    (r"RTX A6000", 154.8e12),
    (r"GeForce RTX 3090", 71e12),
)


def peak_flops(device: torch.device, dtype: torch.dtype) -> float | None:
    """The peak FLOP/s of a device in a dtype; None where it is unknown: all but bfloat16 on the GPUs of the table."""
    if device.type != "cuda" or dtype != torch.bfloat16:
        return None
    return peak_of(torch.cuda.get_device_name(device))


def peak_of(name: str) -> float | None:
    """The peak bfloat16 FLOP/s of a GPU by its name in torch; None for unknown ones, and for parts of a GPU (MIG)."""
    if "MIG" in name:
        return None
    name = name.removeprefix("NVIDIA ")
    return next((peak for pattern, peak in PEAKS if re.fullmatch(pattern, name)), None)


def flops_per_token(model: nn.Module) -> int:
    """FLOPs of training on a token, forward and backward: 6 N, with N the parameters without the input embedding.

    A table that the output layer shares counts, for its product there. The cells' own products do not count.
    """
    size = sum(p.numel() for p in model.parameters())
    table, head = model.get_input_embeddings(), model.get_output_embeddings()
    shared = head is not None and head.weight is table.weight
    return 6 * (size if shared else size - table.weight.numel())
