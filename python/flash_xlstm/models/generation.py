"""What ``generate`` needs to know about a recurrent state."""

from __future__ import annotations

import inspect
from typing import Any

from torch import Tensor
from transformers import GenerationMixin

from flash_xlstm.models.cache import one_cache, xLSTMCache

# What generate() passes along for models with a key-value cache.
_UNUSED = ("past_key_values", "next_sequence_length", "cache_position", "position_ids", "token_type_ids")

# What generate() calls the cache: since transformers 5.24 "cache", for every model.
_NEW_NAME = "cache" in inspect.signature(GenerationMixin.prepare_inputs_for_generation).parameters
_CACHE = "cache" if _NEW_NAME else "cache_params"
_CACHE_NAMES = ("cache_params", "past_key_values", "cache")


class xLSTMGenerationMixin(GenerationMixin):
    """``generate`` with a fixed-size state: greedy search, sampling, beam search, from ids or embeddings."""

    def generate(self, inputs: Tensor | None = None, *args: Any, **kwargs: Any) -> Any:
        """As ``GenerationMixin.generate``, which documents every argument.

        To continue from a cache, pass it as `cache_params` (what ``return_dict_in_generate=True`` returns as
        ``past_key_values``). It is advanced in place; give ``cache.clone()`` to keep it. The inputs are then
        the whole sequence, whose beginning the cache has seen; or only the new tokens, with an
        `attention_mask` that covers the whole sequence.

        Raises:
            ValueError: the cache and the inputs do not fit.
        """
        cache = None
        for name in _CACHE_NAMES:
            if isinstance(kwargs.get(name), xLSTMCache):
                cache = one_cache(cache, kwargs.pop(name))
        if cache is not None:
            kwargs[_CACHE] = cache
            name, given = next(
                (name, t)
                for name, t in (
                    ("inputs_embeds", kwargs.get("inputs_embeds")),
                    ("input_ids", kwargs.get("input_ids")),
                    ("inputs", inputs),
                )
                if t is not None
            )
            length, seen, mask = given.shape[1], cache.get_seq_length(), kwargs.get("attention_mask")
            if mask is not None and mask.shape[1] == seen + length:
                kwargs["attention_mask"] = mask[:, seen:]
                kwargs["cached_tokens"] = 0
            elif length > seen and (mask is None or mask.shape[1] == length):
                kwargs["cached_tokens"] = seen
            else:
                covered = "none" if mask is None else mask.shape[1]
                raise ValueError(
                    f"{name} has {length} tokens and attention_mask {covered}, but cache_params has seen "
                    f"{seen}; pass the whole sequence, which must be longer than that, or only the new "
                    "tokens with an attention_mask that covers both"
                )
        return super().generate(inputs, *args, **kwargs)

    def prepare_inputs_for_generation(
        self,
        input_ids: Tensor,
        cache_params: xLSTMCache | None = None,
        attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        is_first_iteration: bool | None = False,
        cached_tokens: int = 0,
        cache: xLSTMCache | None = None,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """The arguments of the next forward pass.

        Args:
            cached_tokens: how many tokens at the beginning of the inputs the user's cache had seen.
        """
        cache_params = one_cache(cache_params, cache)
        kwargs = {name: value for name, value in kwargs.items() if name not in _UNUSED}
        kwargs.update(cache_params=cache_params, use_cache=use_cache)
        if cache_params is not None and use_cache and not is_first_iteration:
            return {"input_ids": input_ids[:, -1:].to(self.device), **kwargs}  # a new token is never padding

        # From embeddings, generate() always uses a cache: later passes see token ids only.
        embeds = inputs_embeds if is_first_iteration else None
        name, inputs = ("input_ids", input_ids) if embeds is None else ("inputs_embeds", embeds)
        inputs = inputs[:, cached_tokens:].to(self.device)
        if attention_mask is not None:
            attention_mask = attention_mask[:, -inputs.shape[1] :]
        if cache_params is not None and inputs.shape[0] > cache_params.batch_size:
            # Beams, or several samples of one prompt.
            copies, rest = divmod(inputs.shape[0], cache_params.batch_size)
            if rest:
                raise ValueError(
                    f"cache_params has {cache_params.batch_size} rows, which does not divide the batch of "
                    f"{inputs.shape[0]}"
                )
            cache_params.batch_repeat_interleave(copies)
        return {name: inputs, "attention_mask": attention_mask, **kwargs}

    def _update_model_kwargs_for_generation(
        self, outputs: Any, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> dict[str, Any]:
        model_kwargs = super()._update_model_kwargs_for_generation(outputs, model_kwargs, *args, **kwargs)
        # Beam search reorders a cache of these names only.
        if outputs.cache_params is not None:
            model_kwargs["cache" if _NEW_NAME else "past_key_values"] = outputs.cache_params
        return model_kwargs

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        return False
