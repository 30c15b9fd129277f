"""The layers of the xLSTM 7B (arXiv 2503.13427), which :mod:`flash_xlstm.models` stacks into a model.

Names and parameters are those of transformers' xLSTM. The blocks of the first paper are in
:mod:`flash_xlstm.nn.block_stack`. Some names are the same there.
"""

from flash_xlstm.nn.xlstm_7b.block import mLSTMBlock
from flash_xlstm.nn.xlstm_7b.feedforward import FeedForward
from flash_xlstm.nn.xlstm_7b.mlstm import mLSTMLayer
from flash_xlstm.nn.xlstm_7b.norm import MultiHeadLayerNorm, RMSNorm
from flash_xlstm.nn.xlstm_7b.projections import FusableProjections, check_weight_mode, convert_weight_mode

__all__ = [
    "FeedForward",
    "FusableProjections",
    "MultiHeadLayerNorm",
    "RMSNorm",
    "check_weight_mode",
    "convert_weight_mode",
    "mLSTMBlock",
    "mLSTMLayer",
]
