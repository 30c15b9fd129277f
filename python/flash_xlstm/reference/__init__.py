"""Plain PyTorch forms of the ops, in any floating dtype up to float64: what the ops compute, readable and slow.

Gradients come from autograd through these formulas; the tests compare the kernels with them in float64.
"""

from flash_xlstm.reference.mlstm import mlstm_chunkwise, mlstm_parallel, mlstm_recurrent, mlstm_step
from flash_xlstm.reference.pointwise import gated_head_norm, rms_norm, soft_cap, swiglu

__all__ = [
    "gated_head_norm",
    "mlstm_chunkwise",
    "mlstm_parallel",
    "mlstm_recurrent",
    "mlstm_step",
    "rms_norm",
    "soft_cap",
    "swiglu",
]
