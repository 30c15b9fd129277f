"""Which kernel an op takes on a device."""

from __future__ import annotations

import torch

from flash_xlstm._build import build_info

_OPS = (
    "causal_conv1d",
    "causal_conv1d_step",
    "fused_linear_rows",
    "gated_head_norm",
    "linear_rows",
    "mlstm",
    "mlstm_sig",
    "mlstm_step",
    "rms_norm",
    "slstm",
    "slstm_step",
    "soft_cap",
    "swiglu",
)


def kernel_for(op: str, device: torch.device | str) -> str:
    """The kernel that `op` takes on `device`, in words; for people, not for programs.

    Args:
        op: the name of a function of :mod:`flash_xlstm.ops`.
        device: a CPU or CUDA device.

    Raises:
        ValueError: an unknown op.
    """
    if op not in _OPS:
        raise ValueError(f"op is {op!r}; it must be one of {', '.join(_OPS)}")
    device = torch.device(device)
    if device.type == "cpu":
        return f"CPU, {build_info()['cpu_isa']}"
    if device.type != "cuda":
        return "none: flash-xlstm has kernels for CPU and CUDA"
    if not build_info()["cuda"]:
        return "none: built without CUDA kernels"
    if (device.index or 0) >= torch.cuda.device_count():
        return f"none: torch sees {torch.cuda.device_count()} GPUs"
    if torch.cuda.get_device_capability(device)[0] < 8:
        return "none: the CUDA kernels need compute capability 8.0 or later"
    hopper = torch.cuda.get_device_capability(device) == (9, 0) and "90a" in build_info()["architectures"]
    if op == "slstm" and hopper:
        return (
            "CUDA, Hopper (a cluster a head, R in registers) for bfloat16 and float16 with dim a multiple of 8, up to "
            "768, else portable"
        )
    if op in ("mlstm", "mlstm_sig"):
        portable = "portable (mma.sync tensor cores: bfloat16, tf32 for float16, 3x split tf32 for float32)"
        if hopper:
            return f"CUDA, Hopper (wgmma) for 16-bit types with dqk and dv multiples of 8, 16 to 1024, else {portable}"
        return f"CUDA, {portable}"
    if op in ("linear_rows", "fused_linear_rows"):
        if hopper:
            return "CUDA, Hopper (a stream of the copy engine, mma.sync), for bfloat16"
        return "CUDA, portable (mma.sync tensor cores), for bfloat16"
    return "CUDA, portable"
