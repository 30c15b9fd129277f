"""Layers of the xLSTM, made of the ops. They need torch only; :mod:`flash_xlstm.models` stacks them into a
model."""

from flash_xlstm.nn.block import mLSTMBlock
from flash_xlstm.nn.feedforward import FeedForward
from flash_xlstm.nn.linear import linear
from flash_xlstm.nn.mlstm import mLSTMLayer
from flash_xlstm.nn.norm import MultiHeadLayerNorm, RMSNorm
from flash_xlstm.nn.projections import FusableProjections, convert_weight_mode

__all__ = [
    "FeedForward",
    "FusableProjections",
    "MultiHeadLayerNorm",
    "RMSNorm",
    "convert_weight_mode",
    "linear",
    "mLSTMBlock",
    "mLSTMLayer",
]
