"""Layers of the xLSTM, built from the ops. They need torch only.

:mod:`flash_xlstm.nn.xlstm_7b` has the layers of the xLSTM 7B, which :mod:`flash_xlstm.models` stacks into a model.
:mod:`flash_xlstm.nn.block_stack` has the blocks of the first paper, a stack that mixes mLSTM and sLSTM blocks, and its
language model. Some class names occur in both: mLSTMBlock and mLSTMLayer of this package are the 7B's.
"""

from typing import Any

from flash_xlstm.nn import _moved
from flash_xlstm.nn.block_stack import (
    BiMLSTM,
    BiSLSTM,
    xLSTMBlockStack,
    xLSTMBlockStackConfig,
    xLSTMLMModel,
    xLSTMLMModelConfig,
)
from flash_xlstm.nn.linear import linear
from flash_xlstm.nn.state import detach_state, reset_rows
from flash_xlstm.nn.xlstm_7b import (
    FeedForward,
    FusableProjections,
    MultiHeadLayerNorm,
    RMSNorm,
    check_weight_mode,
    convert_weight_mode,
    mLSTMBlock,
    mLSTMLayer,
)

__all__ = [
    "BiMLSTM",
    "BiSLSTM",
    "FeedForward",
    "FusableProjections",
    "MultiHeadLayerNorm",
    "RMSNorm",
    "check_weight_mode",
    "convert_weight_mode",
    "detach_state",
    "linear",
    "mLSTMBlock",
    "mLSTMLayer",
    "reset_rows",
    "xLSTMBlockStack",
    "xLSTMBlockStackConfig",
    "xLSTMLMModel",
    "xLSTMLMModelConfig",
]

_moved.install()


def __getattr__(name: str) -> Any:
    return _moved.attribute(__name__, name)
