"""Fast and exact xLSTM: CUDA and CPU kernels, torch ops over them, and a Hugging Face compatible model.

``import flash_xlstm`` imports nothing else. A name of the package, and torch with it, is imported at its first use.
``import flash_xlstm.ops`` registers the operators ``torch.ops.flash_xlstm``.
"""

from typing import TYPE_CHECKING

from flash_xlstm._lazy import attach

if TYPE_CHECKING:
    from flash_xlstm import distributed as distributed
    from flash_xlstm import models as models
    from flash_xlstm import nn as nn
    from flash_xlstm import ops as ops
    from flash_xlstm import reference as reference
    from flash_xlstm import training as training
    from flash_xlstm._build import __version__ as __version__
    from flash_xlstm._build import build_info as build_info

__all__ = ["__version__", "build_info", "distributed", "models", "nn", "ops", "reference", "training"]

__getattr__, __dir__ = attach(
    __name__,
    {
        "__version__": "flash_xlstm._build",
        "build_info": "flash_xlstm._build",
        "distributed": None,
        "models": None,
        "nn": None,
        "ops": None,
        "reference": None,
        "training": None,
    },
)
