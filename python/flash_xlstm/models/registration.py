"""Making transformers' Auto classes build our classes."""

from __future__ import annotations

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from flash_xlstm.models.configuration_xlstm import xLSTMConfig
from flash_xlstm.models.modeling_xlstm import xLSTMForCausalLM, xLSTMModel


def register() -> None:
    """Makes ``AutoConfig``, ``AutoModel`` and ``AutoModelForCausalLM`` use this package for model type
    ``xlstm``.

    It holds for the running process and may be called any number of times.

    Example::

        import flash_xlstm.models
        from transformers import AutoModelForCausalLM

        flash_xlstm.models.register()
        model = AutoModelForCausalLM.from_pretrained("NX-AI/xLSTM-7b")
    """
    AutoConfig.register(xLSTMConfig.model_type, xLSTMConfig, exist_ok=True)
    AutoModel.register(xLSTMConfig, xLSTMModel, exist_ok=True)
    AutoModelForCausalLM.register(xLSTMConfig, xLSTMForCausalLM, exist_ok=True)
