"""Classification heads: transformers' generic ones on this package's model."""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers.modeling_layers import GenericForSequenceClassification, GenericForTokenClassification

from flash_xlstm.models.configuration_xlstm import xLSTMConfig
from flash_xlstm.models.modeling_xlstm import xLSTMModel, xLSTMPreTrainedModel


def _one_document(backbone: nn.Module, given: Any, output: Any) -> None:
    offsets = getattr(output, "cu_seqlens", None)
    if offsets is not None and len(offsets) - 1 > len(output.last_hidden_state):
        raise ValueError(
            "the rows hold several documents (cu_seqlens, seq_idx, position_ids or attention_mask says so), and a row "
            "gets one class; give each document a row"
        )


class _Classifier(xLSTMPreTrainedModel):
    """What both heads share. Transformers' own constructors build the model by AutoModel, which has this package's only
    while it is registered."""

    def _build(self, config: xLSTMConfig, *, bias: bool) -> None:
        self.num_labels = config.num_labels
        self.backbone = xLSTMModel(config)
        self.backbone.caches_by_default = False
        self.score = nn.Linear(config.hidden_size, config.num_labels, bias=bias)

    def get_input_embeddings(self) -> nn.Module:
        return self.backbone.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.backbone.set_input_embeddings(value)


class xLSTMForSequenceClassification(GenericForSequenceClassification, _Classifier):
    """The xLSTM with a linear layer on the last token of each row, ``score``.

    The last token is the last one that is not ``config.pad_token_id``, as in transformers' other causal models, and the
    row's last one with ``inputs_embeds``. `num_labels` and `problem_type` of the configuration choose the loss.
    Arguments are those of :meth:`xLSTMModel.forward`, and ``labels``: (batch,) classes, or (batch, num_labels).
    Default: no cache. Rows that hold several documents end in a ValueError.
    """

    base_model_prefix = "backbone"

    def __init__(self, config: xLSTMConfig) -> None:
        xLSTMPreTrainedModel.__init__(self, config)
        self._build(self.config, bias=False)
        self.backbone.register_forward_hook(_one_document)
        self.post_init()


class xLSTMForTokenClassification(GenericForTokenClassification, _Classifier):
    """The xLSTM with dropout and a linear layer on every token, ``score``.

    ``classifier_dropout`` of the configuration is the dropout's rate, by default 0.1. Arguments are those of
    :meth:`xLSTMModel.forward`, and ``labels``: (batch, seq) classes, -100 where none counts. Default: no cache. A token
    sees only those before it: :class:`flash_xlstm.nn.BiMLSTM` reads both directions.
    """

    base_model_prefix = "backbone"

    def __init__(self, config: xLSTMConfig) -> None:
        xLSTMPreTrainedModel.__init__(self, config)
        dropout: Any = getattr(self.config, "classifier_dropout", None)
        self.dropout = nn.Dropout(0.1 if dropout is None else dropout)
        self._build(self.config, bias=True)
        self.post_init()
