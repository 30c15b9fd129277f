"""The xLSTM as a Hugging Face model. Needs transformers: ``pip install "flash-xlstm[hf]"``.

It also exports the stack and the language model of :mod:`flash_xlstm.nn.block_stack`, which need torch only.
"""

try:
    import transformers  # noqa: F401
except ImportError as error:
    raise ImportError(
        "flash_xlstm.models needs transformers, which could not be imported. Install it with: "
        'pip install "flash-xlstm[hf]"'
    ) from error

from flash_xlstm.models.cache import xLSTMCache
from flash_xlstm.models.classification import xLSTMForSequenceClassification, xLSTMForTokenClassification
from flash_xlstm.models.configuration_xlstm import xLSTMConfig
from flash_xlstm.models.modeling_xlstm import (
    xLSTMCausalLMOutput,
    xLSTMForCausalLM,
    xLSTMModel,
    xLSTMOutput,
    xLSTMPreTrainedModel,
)
from flash_xlstm.models.registration import register, unregister
from flash_xlstm.nn.block_stack import xLSTMBlockStack, xLSTMBlockStackConfig, xLSTMLMModel, xLSTMLMModelConfig

__all__ = [
    "register",
    "unregister",
    "xLSTMBlockStack",
    "xLSTMBlockStackConfig",
    "xLSTMCache",
    "xLSTMCausalLMOutput",
    "xLSTMConfig",
    "xLSTMForCausalLM",
    "xLSTMForSequenceClassification",
    "xLSTMForTokenClassification",
    "xLSTMLMModel",
    "xLSTMLMModelConfig",
    "xLSTMModel",
    "xLSTMOutput",
    "xLSTMPreTrainedModel",
]
