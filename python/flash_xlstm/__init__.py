"""Fast and exact xLSTM: CUDA and CPU kernels, torch ops over them, and a Hugging Face compatible model."""

from flash_xlstm import ops, reference
from flash_xlstm._build import build_info

__version__ = build_info()["version"]
__all__ = ["__version__", "build_info", "ops", "reference"]
