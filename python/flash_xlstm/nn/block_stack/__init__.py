"""The xLSTM of arXiv 2405.04517: mLSTM and sLSTM blocks, stacks that mix them, a language model.

Names, configurations and parameters are those of NX-AI's package ``xlstm``. It needs torch only.
:mod:`flash_xlstm.nn.xlstm_7b` has the different blocks of the xLSTM 7B.
"""

from flash_xlstm.nn.block_stack.bidirectional import BiMLSTM, BiSLSTM
from flash_xlstm.nn.block_stack.configuration import (
    FeedForwardConfig,
    mLSTMBlockConfig,
    mLSTMLayerConfig,
    sLSTMBlockConfig,
    sLSTMLayerConfig,
    xLSTMBlockStackConfig,
    xLSTMLMModelConfig,
)
from flash_xlstm.nn.block_stack.language_model import xLSTMLMModel
from flash_xlstm.nn.block_stack.layers import CausalConv1d, GatedFeedForward, LinearHeadwiseExpand
from flash_xlstm.nn.block_stack.mlstm import LayerState, mLSTMCell, mLSTMLayer
from flash_xlstm.nn.block_stack.slstm import sLSTMCell, sLSTMLayer
from flash_xlstm.nn.block_stack.stack import StackState, mLSTMBlock, sLSTMBlock, xLSTMBlock, xLSTMBlockStack

__all__ = [
    "BiMLSTM",
    "BiSLSTM",
    "CausalConv1d",
    "FeedForwardConfig",
    "GatedFeedForward",
    "LayerState",
    "LinearHeadwiseExpand",
    "StackState",
    "mLSTMBlock",
    "mLSTMBlockConfig",
    "mLSTMCell",
    "mLSTMLayer",
    "mLSTMLayerConfig",
    "sLSTMBlock",
    "sLSTMBlockConfig",
    "sLSTMCell",
    "sLSTMLayer",
    "sLSTMLayerConfig",
    "xLSTMBlock",
    "xLSTMBlockStack",
    "xLSTMBlockStackConfig",
    "xLSTMLMModel",
    "xLSTMLMModelConfig",
]
