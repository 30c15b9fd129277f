"""Making transformers build our classes where it would build its own xLSTM."""

from __future__ import annotations

import gc
from types import ModuleType

import transformers
import transformers.models.xlstm
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from flash_xlstm.models.configuration_xlstm import xLSTMConfig
from flash_xlstm.models.modeling_xlstm import xLSTMForCausalLM, xLSTMModel, xLSTMPreTrainedModel

_CLASSES = (xLSTMConfig, xLSTMPreTrainedModel, xLSTMModel, xLSTMForCausalLM)
_AUTO_CLASSES = ((AutoModel, xLSTMModel), (AutoModelForCausalLM, xLSTMForCausalLM))


_NAMESPACES = ("transformers", "transformers.models.xlstm")  # not what is below: there they refer to each other


def _namespaces() -> list[ModuleType]:
    # While it is imported, transformers makes a second module of itself; who imported it early holds the first one,
    # which nothing else leads to.
    kind = type(transformers)
    return [module for module in gc.get_objects() if type(module) is kind and module.__name__ in _NAMESPACES]


def register() -> None:
    """Makes transformers use this package's classes for model type ``xlstm``.

    ``AutoConfig``, ``AutoModel`` and ``AutoModelForCausalLM`` build them, and ``transformers.xLSTMForCausalLM`` and its
    like are them, for loaders that look a checkpoint's class up by name. It holds for the running process, until
    :func:`unregister`, and may be called any number of times. What was imported or built before stays what it is;
    transformers' own classes remain in ``transformers.models.xlstm.modeling_xlstm``, and are no base classes of ours.

    Example::

        import flash_xlstm.models
        from transformers import AutoModelForCausalLM

        flash_xlstm.models.register()
        model = AutoModelForCausalLM.from_pretrained("NX-AI/xLSTM-7b")
    """
    AutoConfig.register(xLSTMConfig.model_type, xLSTMConfig, exist_ok=True)
    for auto, model in _AUTO_CLASSES:
        auto.register(xLSTMConfig, model, exist_ok=True)
    for namespace in _namespaces():
        for ours in _CLASSES:
            setattr(namespace, ours.__name__, ours)


def unregister() -> None:
    """Undoes :func:`register`: transformers uses its own classes again. Does nothing where nothing was registered."""
    if CONFIG_MAPPING._extra_content.get(xLSTMConfig.model_type) is xLSTMConfig:
        del CONFIG_MAPPING._extra_content[xLSTMConfig.model_type]
    for auto, _ in _AUTO_CLASSES:
        auto._model_mapping._extra_content.pop(xLSTMConfig, None)
    for namespace in _namespaces():
        for ours in _CLASSES:
            if vars(namespace).get(ours.__name__) is ours:
                delattr(namespace, ours.__name__)  # transformers' modules then look theirs up again
