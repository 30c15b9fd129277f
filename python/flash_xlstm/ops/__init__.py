"""Torch ops of the xLSTM. Each is backed by operators of the namespace ``torch.ops.flash_xlstm``."""

from flash_xlstm.ops.dispatch import kernel_for
from flash_xlstm.ops.linear import linear_rows
from flash_xlstm.ops.mlstm import MlstmState, mlstm, mlstm_step
from flash_xlstm.ops.pointwise import gated_head_norm, rms_norm, soft_cap, swiglu

__all__ = [
    "MlstmState",
    "gated_head_norm",
    "kernel_for",
    "linear_rows",
    "mlstm",
    "mlstm_step",
    "rms_norm",
    "soft_cap",
    "swiglu",
]
