"""Registration of this package's classes in transformers, in place of its own xLSTM."""

from __future__ import annotations

import gc
from types import ModuleType

import transformers
import transformers.models.xlstm
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
)
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from flash_xlstm.models.classification import xLSTMForSequenceClassification, xLSTMForTokenClassification
from flash_xlstm.models.configuration_xlstm import xLSTMConfig
from flash_xlstm.models.modeling_xlstm import xLSTMForCausalLM, xLSTMModel, xLSTMPreTrainedModel

_AUTO_CLASSES = (
    (AutoModel, xLSTMModel),
    (AutoModelForCausalLM, xLSTMForCausalLM),
    (AutoModelForSequenceClassification, xLSTMForSequenceClassification),
    (AutoModelForTokenClassification, xLSTMForTokenClassification),
)
_CLASSES = (xLSTMConfig, xLSTMPreTrainedModel, *(model for _, model in _AUTO_CLASSES))


_NAMESPACES = ("transformers", "transformers.models.xlstm")  # not its submodule, whose classes refer to each other


def _namespaces() -> list[ModuleType]:
    # During its import transformers replaces its own module by a second one. Code that imported it early holds the
    # first one, which is reachable in no other way.
    kind = type(transformers)
    return [module for module in gc.get_objects() if type(module) is kind and module.__name__ in _NAMESPACES]


def register() -> None:
    """Makes transformers use this package's classes for model type ``xlstm``.

    ``AutoConfig``, ``AutoModel``, ``AutoModelForCausalLM``, ``AutoModelForSequenceClassification`` and
    ``AutoModelForTokenClassification`` build them. ``transformers.xLSTMForCausalLM`` and the related names refer to
    them, for loaders that look up a checkpoint's class by name. The registration lasts until
    :func:`unregister` or the end of the process; repeated calls are harmless. Names imported and models built before do
    not change. transformers' own classes remain in ``transformers.models.xlstm.modeling_xlstm``; ours do not derive
    from them.

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
    """Undoes :func:`register`: transformers uses its own classes again. Without a registration it does nothing."""
    if CONFIG_MAPPING._extra_content.get(xLSTMConfig.model_type) is xLSTMConfig:
        del CONFIG_MAPPING._extra_content[xLSTMConfig.model_type]
    for auto, _ in _AUTO_CLASSES:
        auto._model_mapping._extra_content.pop(xLSTMConfig, None)
    for namespace in _namespaces():
        for ours in _CLASSES:
            if vars(namespace).get(ours.__name__) is ours:
                delattr(namespace, ours.__name__)  # transformers' lazy modules then look up their own
