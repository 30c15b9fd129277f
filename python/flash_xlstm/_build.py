"""Facts about the compiled core. Importing this module loads it and registers the torch operators."""

from __future__ import annotations

import functools

import torch  # before _C, which links against torch's libraries

from flash_xlstm import _C

# The operators' limits, read from C++ (csrc/params). A limit with cuda in its name holds on CUDA only.
LIMITS: dict[str, int] = _C.limits()


def few_rows(device_type: str) -> tuple[tuple[torch.dtype, ...], int]:
    """The dtypes and the most rows for which linear_rows is faster than torch's product on ``cpu`` or ``cuda``."""
    dtypes, rows = _C.few_rows(device_type == "cuda")
    return tuple(getattr(torch, name) for name in dtypes), rows


@functools.cache
def kept_floats(dtype: torch.dtype, dqk: int, dv: int, device: torch.device) -> int:
    """The floats of the mLSTM's states that a forward can keep for the backward, for each chunk of
    ``LIMITS["mlstm_kept_tokens"]`` and head; 0 where it keeps none."""
    if device.type != "cuda" or not torch.cuda.is_available():
        return 0
    index = torch.cuda.current_device() if device.index is None else device.index
    return _C.mlstm_kept_floats(str(dtype)[6:], dqk, dv, index)


def kept_states(dqk: int, dv: int) -> tuple[int, int]:
    """On CPUs: the floats of one of the mLSTM's states that a forward can keep for the backward, and at every how many
    tokens of a row and head there is one, but for the first."""
    return _C.mlstm_kept_states(dqk, dv)


def build_info() -> dict[str, str]:
    """Facts about this build and the torch it runs on.

    Returns:
        A dict with ``version``, ``commit`` (of the source, ``unknown`` outside a git checkout), ``cuda`` (the CUDA
        compiler's version, empty in a CPU-only build), ``architectures``, ``compiler``, ``cpu_isa`` (the instruction
        set that the CPU kernels use on this machine), ``torch_built`` (the torch whose headers were used) and
        ``torch_running``.
    """
    return {**_C.build_info(), "torch_running": torch.__version__}


__version__ = build_info()["version"]
