"""What ``generate`` needs to know about a recurrent state."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationMixin
from transformers.generation import EosTokenCriteria, GenerateDecoderOnlyOutput, MaxLengthCriteria
from transformers.generation.streamers import BaseStreamer

from flash_xlstm.models import decoding
from flash_xlstm.models.cache import one_cache, xLSTMCache

# What generate() passes along for models with a key-value cache.
_UNUSED = ("past_key_values", "next_sequence_length", "cache_position", "position_ids", "token_type_ids")

# What generate() calls the cache: since transformers 5.24 "cache", for every model.
_NEW_NAME = "cache" in inspect.signature(GenerationMixin.prepare_inputs_for_generation).parameters
_CACHE = "cache" if _NEW_NAME else "cache_params"
_CACHE_NAMES = ("cache_params", "past_key_values", "cache")
_OUTPUT_CACHE = "cache" if "cache" in inspect.signature(GenerateDecoderOnlyOutput).parameters else "past_key_values"


class _Later(BaseStreamer):
    """Asks ``_sample`` to leave the loop to the caller."""

    def __init__(self) -> None:
        self.tokens: Iterator[Tensor] | None = None

    def put(self, value: Tensor) -> None:
        """The prompt; nothing to do."""

    def end(self) -> None:
        """Never called by the loop."""


class xLSTMGenerationMixin(GenerationMixin):
    """``generate`` with a fixed-size state: greedy search, sampling, beam search, from ids or embeddings.

    Greedy search and sampling with a cache go through a loop of this package (:mod:`flash_xlstm.models.decoding`),
    which gives what transformers' own would. On CUDA it captures the decoding step once for each batch size in a CUDA
    graph and replays it. Everything else (beam search, scores or hidden states to return, several devices) takes
    transformers' loop.

    Attributes:
        use_cuda_graphs: whether steps may be captured. Graphs follow weights that change in place, and are captured
            again for other ones; what else the forward pass depends on (hooks, an adapter switched off) they do not
            see: call :meth:`release_graphs` after changing it.
    """

    use_cuda_graphs = True

    def generate(self, inputs: Tensor | None = None, *args: Any, **kwargs: Any) -> Any:
        """As ``GenerationMixin.generate``, which documents every argument.

        To continue from a cache, pass it as `cache_params` (what ``return_dict_in_generate=True`` returns as
        ``past_key_values``). It is advanced in place; give ``cache.clone()`` to keep it. The inputs are then
        the whole sequence, whose beginning the cache has seen; or only the new tokens, with an
        `attention_mask` that covers the whole sequence.

        Raises:
            ValueError: the inputs are not (batch, tokens), or embeddings not (batch, tokens, hidden_size); the cache
                and the inputs do not fit.
        """
        named = {"inputs_embeds": kwargs.get("inputs_embeds"), "input_ids": kwargs.get("input_ids"), "inputs": inputs}
        given: dict[str, Tensor] = {name: t for name, t in named.items() if t is not None}
        for name, x in {**given, "attention_mask": kwargs.get("attention_mask")}.items():
            axes = "(batch, tokens, hidden_size)" if name == "inputs_embeds" else "(batch, tokens)"
            if x is not None and x.ndim != axes.count(",") + 1:
                raise ValueError(f"{name} is of shape {tuple(x.shape)}; expected {axes}")
        cache = None
        for name in _CACHE_NAMES:
            if isinstance(kwargs.get(name), xLSTMCache):
                cache = one_cache(**{"cache_params": cache, name: kwargs.pop(name)})
        if cache is not None:
            kwargs[_CACHE] = cache
            if not given:
                raise ValueError("cache_params needs inputs: the whole sequence, or new tokens")
            name, t = next(iter(given.items()))
            length, seen, mask = t.shape[1], cache.get_seq_length(), kwargs.get("attention_mask")
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

    def stream(self, inputs: Tensor | None = None, **kwargs: Any) -> Iterator[Tensor]:
        """Generates token by token.

        Args:
            inputs, kwargs: as for :meth:`generate`; greedy search or sampling, with a cache.

        Returns:
            An iterator over the new tokens, (batch,) each, on the CPU; it ends where ``generate`` would. The prompt is
            read before this returns; an iterator that is left early stops the generation.

        Raises:
            ValueError: for these arguments ``generate`` takes transformers' loop, which cannot be iterated over.

        Example::

            for token in model.stream(input_ids, max_new_tokens=100):
                print(tokenizer.decode(token), end="", flush=True)
        """
        later = _Later()
        self.generate(inputs, streamer=later, **kwargs)
        if later.tokens is None:
            raise ValueError("stream() needs greedy search or sampling with a cache, and only tokens as the result")
        return later.tokens

    def release_graphs(self) -> None:
        """Frees the CUDA graphs and the states that decoding keeps for the next call."""
        decoding.release(self)

    def _sample(
        self,
        input_ids: Tensor,
        logits_processor: Any,
        stopping_criteria: Any,
        generation_config: Any,
        synced_gpus: bool = False,
        streamer: BaseStreamer | None = None,
        **model_kwargs: Any,
    ) -> Any:
        if not self._loop_serves(stopping_criteria, generation_config, synced_gpus, model_kwargs):
            if isinstance(streamer, _Later):
                return input_ids
            return super()._sample(
                input_ids, logits_processor, stopping_criteria, generation_config, synced_gpus, streamer, **model_kwargs
            )
        given = any(isinstance(model_kwargs.get(name), xLSTMCache) for name in _CACHE_NAMES)
        prompt = self.prepare_inputs_for_generation(input_ids, is_first_iteration=True, **model_kwargs)
        outputs = self(**prompt, return_dict=True)
        session = decoding.Session(
            self,
            outputs.cache_params,
            outputs.logits[:, -1].to(input_ids.device, torch.float32),
            input_ids,
            max(1, stopping_criteria.max_length - input_ids.shape[1]),
            _choice(logits_processor, stopping_criteria, generation_config),
            keep_cache=given or generation_config.return_dict_in_generate,
            use_graph=self.use_cuda_graphs and input_ids.is_cuda and not torch.cuda.is_current_stream_capturing(),
        )
        del outputs
        if isinstance(streamer, _Later):
            streamer.tokens = _without_gradients(session.run(each=True))
            return input_ids
        for token in session.run(each=streamer is not None):
            if streamer is not None:
                streamer.put(token)
        if streamer is not None:
            streamer.end()
        if not generation_config.return_dict_in_generate:
            return session.sequences
        return GenerateDecoderOnlyOutput(sequences=session.sequences, **{_OUTPUT_CACHE: session.cache})

    def _loop_serves(self, criteria: Any, config: Any, synced_gpus: bool, model_kwargs: dict[str, Any]) -> bool:
        outputs = ("output_attentions", "output_hidden_states", "output_scores", "output_logits")
        devices = set((getattr(self, "hf_device_map", None) or {}).values())
        return (
            bool(model_kwargs.get("use_cache"))
            and criteria.max_length is not None
            and not synced_gpus
            and not any(getattr(config, name, False) for name in outputs)
            and not getattr(config, "prefill_chunk_size", None)
            and not getattr(config, "is_assistant", False)
            and not self.config.output_hidden_states
            and not model_kwargs.get("output_hidden_states")
            and len(devices) < 2
        )

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
        cache_params = one_cache(cache_params=cache_params, cache=cache)
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


def _choice(processors: Any, criteria: Any, config: Any) -> decoding.Choice:
    ends = [criterion for criterion in criteria if isinstance(criterion, EosTokenCriteria)]
    other = [c for c in criteria if not isinstance(c, (EosTokenCriteria, MaxLengthCriteria))]
    eos = sorted({int(token) for criterion in ends for token in criterion.eos_token_id.flatten().tolist()})
    pad = getattr(config, "_pad_token_tensor", None)
    return decoding.Choice(list(processors), bool(config.do_sample), tuple(eos), 0 if pad is None else int(pad), other)


def _without_gradients(tokens: Iterator[Tensor]) -> Iterator[Tensor]:
    while True:
        with torch.no_grad():
            token = next(tokens, None)
        if token is None:
            return
        yield token
