"""Torch ops of the xLSTM. Each is backed by operators of the namespace ``torch.ops.flash_xlstm``."""

from flash_xlstm.ops import _vmap, flops, pointwise  # noqa: F401  (_vmap and flops register rules and formulas)
from flash_xlstm.ops.conv import causal_conv1d, causal_conv1d_step
from flash_xlstm.ops.dispatch import kernel_for
from flash_xlstm.ops.linear import fused_linear_rows, linear_rows
from flash_xlstm.ops.loss import linear_cross_entropy
from flash_xlstm.ops.mlstm import MlstmState, mlstm, mlstm_prefill, mlstm_step
from flash_xlstm.ops.mlstm_sig import MlstmSigState, mlstm_sig
from flash_xlstm.ops.mlstm_state import mlstm_state
from flash_xlstm.ops.pointwise import *  # noqa: F403
from flash_xlstm.ops.slstm import SlstmState, slstm, slstm_step

__all__ = [
    "MlstmSigState",
    "MlstmState",
    "SlstmState",
    "causal_conv1d",
    "causal_conv1d_step",
    "fused_linear_rows",
    "kernel_for",
    "linear_cross_entropy",
    "linear_rows",
    "mlstm",
    "mlstm_prefill",
    "mlstm_sig",
    "mlstm_state",
    "mlstm_step",
    "slstm",
    "slstm_step",
]
__all__ += pointwise.__all__
