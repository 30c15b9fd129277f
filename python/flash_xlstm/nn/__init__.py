"""Layers of the xLSTM, made of the ops. They need torch only.

Those here are of the xLSTM 7B, which :mod:`flash_xlstm.models` stacks into a model. Those of the first xLSTM, which
mixes mLSTM and sLSTM blocks, are in :mod:`flash_xlstm.nn.blocks`; its stack and language model are here too.
"""

from flash_xlstm.nn.block import mLSTMBlock
from flash_xlstm.nn.blocks import xLSTMBlockStack, xLSTMBlockStackConfig, xLSTMLMModel, xLSTMLMModelConfig
from flash_xlstm.nn.feedforward import FeedForward
from flash_xlstm.nn.linear import linear
from flash_xlstm.nn.mlstm import mLSTMLayer
from flash_xlstm.nn.norm import MultiHeadLayerNorm, RMSNorm
from flash_xlstm.nn.projections import FusableProjections, check_weight_mode, convert_weight_mode

__all__ = [
    "FeedForward",
    "FusableProjections",
    "MultiHeadLayerNorm",
    "RMSNorm",
    "check_weight_mode",
    "convert_weight_mode",
    "linear",
    "mLSTMBlock",
    "mLSTMLayer",
    "xLSTMBlockStack",
    "xLSTMBlockStackConfig",
    "xLSTMLMModel",
    "xLSTMLMModelConfig",
]
