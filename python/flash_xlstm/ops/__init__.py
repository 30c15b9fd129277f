"""Torch ops of the xLSTM. Each is backed by operators of the namespace ``torch.ops.flash_xlstm``."""

from flash_xlstm.ops.dispatch import kernel_for
from flash_xlstm.ops.mlstm import MlstmState, mlstm, mlstm_step
from flash_xlstm.ops.mlstm_sig import MlstmSigState, mlstm_sig
from flash_xlstm.ops.pointwise import soft_cap

__all__ = ["MlstmSigState", "MlstmState", "kernel_for", "mlstm", "mlstm_sig", "mlstm_step", "soft_cap"]
