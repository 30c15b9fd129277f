"""The model as a function of tensors, for torch.export, AOTInductor and ONNX."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from flash_xlstm.models.cache import check_count, xLSTMCache
from flash_xlstm.models.modeling_xlstm import xLSTMForCausalLM


class TensorModel(nn.Module):
    """The language model with its states passed in and out as tensors: ``(input_ids, *states) -> (logits, *states)``.

    One program with several tokens reads prompts, and one with a single token decodes; both go on from any states. The
    given states are not changed.

    Args:
        model: an xLSTM. It is put into eval mode.

    Shape:
        - input_ids: (batch, seq), int64.
        - states: c (batch, heads, qk_head_dim, v_head_dim), n (batch, heads, qk_head_dim) and m (batch, heads) of the
          first layer, then of the next. :meth:`initial_states` gives those before the first token.
        - logits: (batch, seq, vocab_size), float32.

    Example::

        decode = TensorModel(model)
        states = decode.initial_states(1)
        with torch.no_grad():
            program = torch.export.export(decode, (torch.zeros(1, 1, dtype=torch.long), *states))

    Raises:
        TypeError: model is none of this package's.
        ValueError: the number of states does not fit.
        RuntimeError: gradients are on.
    """

    def __init__(self, model: xLSTMForCausalLM) -> None:
        if not isinstance(model, xLSTMForCausalLM):
            raise TypeError(f"model is a {type(model).__name__}; it must be a flash_xlstm.models.xLSTMForCausalLM")
        super().__init__()
        self.model = model.eval()
        self.dtype = getattr(torch, model.config.inference_state_dtype)

    def initial_states(self, batch_size: int) -> tuple[Tensor, ...]:
        """The states before the first token, on the model's device.

        Raises:
            TypeError, ValueError: `batch_size` is no whole number, or less than 0.
        """
        check_count("batch_size", batch_size, 0)
        cache = xLSTMCache(self.model.config, batch_size, device=self.model.device)
        return tuple(t for state in cache.layer_states() for t in state)

    def forward(self, input_ids: Tensor, *states: Tensor) -> tuple[Tensor, ...]:
        if torch.is_grad_enabled():  # a no_grad in here would end up in the program, as a part of its own
            raise RuntimeError("TensorModel has no gradient; call and export it under torch.no_grad()")
        layers = self.model.config.num_hidden_layers
        if len(states) != 3 * layers:
            raise ValueError(f"states has {len(states)} tensors; it must have {3 * layers}, c, n and m of each layer")
        own = [t.clone() for t in states]
        cache = xLSTMCache.from_states(zip(own[::3], own[1::3], own[2::3], strict=True), self.dtype, 0)
        out = self.model(input_ids, cache_params=cache, use_cache=True)
        return (out.logits, *(t for state in out.cache_params.layer_states() for t in state))
