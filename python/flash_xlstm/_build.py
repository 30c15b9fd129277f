"""Facts about the compiled core. Importing this module loads it and registers the torch operators."""

from __future__ import annotations

import torch  # before _C: it loads the libraries that _C resolves against

from flash_xlstm import _C


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
