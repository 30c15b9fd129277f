"""The choice of a run's device."""

from __future__ import annotations

import torch

from flash_xlstm import ops
from flash_xlstm.training.errors import TrainingError, reason


def choose_device(name: str) -> torch.device:
    """The device of a name. "auto" means a GPU if this build has kernels for it, else the CPU.

    Raises:
        TrainingError: the device does not exist, or this build has no kernels for it.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() and _has_kernels("cuda") else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise TrainingError(f"`device` {name}: {reason(error)}") from error
    if not _has_kernels(device):
        raise TrainingError(f"`device` {name}: {ops.kernel_for('mlstm', device)}")
    return device


def _has_kernels(device: torch.device | str) -> bool:
    return not ops.kernel_for("mlstm", device).startswith("none")
