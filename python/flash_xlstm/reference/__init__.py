"""Plain PyTorch forms of the ops, in any floating dtype up to float64. They are readable and slow.

Gradients come from autograd through these formulas. The tests compare the kernels with them in float64.
"""

from flash_xlstm.reference import float8 as float8
from flash_xlstm.reference import pointwise
from flash_xlstm.reference.conv import causal_conv1d, causal_conv1d_step
from flash_xlstm.reference.loss import linear_cross_entropy
from flash_xlstm.reference.mlstm import (
    mlstm_chunkwise,
    mlstm_parallel,
    mlstm_prefill,
    mlstm_recurrent,
    mlstm_state,
    mlstm_step,
)
from flash_xlstm.reference.mlstm_sig import mlstm_sig_chunkwise, mlstm_sig_parallel, mlstm_sig_recurrent
from flash_xlstm.reference.pointwise import *  # noqa: F403
from flash_xlstm.reference.slstm import slstm, slstm_step

__all__ = [
    "causal_conv1d",
    "causal_conv1d_step",
    "linear_cross_entropy",
    "mlstm_chunkwise",
    "mlstm_parallel",
    "mlstm_prefill",
    "mlstm_recurrent",
    "mlstm_sig_chunkwise",
    "mlstm_sig_parallel",
    "mlstm_sig_recurrent",
    "mlstm_state",
    "mlstm_step",
    "slstm",
    "slstm_step",
]
__all__ += pointwise.__all__
