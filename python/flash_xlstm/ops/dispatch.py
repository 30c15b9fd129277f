"""The kernel that an op takes on a device."""

from __future__ import annotations

import torch

from flash_xlstm import _C


def kernel_for(op: str, device: torch.device | str) -> str:
    """The kernel that `op` takes on `device`, in words. The text is for people and may change.

    Args:
        op: the name of a function of :mod:`flash_xlstm.ops`.
        device: a CPU or CUDA device.

    Raises:
        ValueError: an unknown op.
    """
    if op not in _C.ops():
        raise ValueError(f"op is {op!r}; it must be one of {', '.join(_C.ops())}")
    device = torch.device(device)
    if device.type == "cpu":
        return _C.kernel_for(op, None)
    if device.type != "cuda":
        return "none: flash-xlstm has kernels for CPU and CUDA"
    if not _C.build_info()["cuda"]:
        return _C.kernel_for(op, (0, 0))
    if (device.index or 0) >= torch.cuda.device_count():
        return f"none: torch sees {torch.cuda.device_count()} GPUs"
    return _C.kernel_for(op, torch.cuda.get_device_capability(device))
