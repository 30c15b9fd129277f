"""``generate`` for models with a recurrent state."""

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

# Arguments that generate() passes to models with a key-value cache.
_UNUSED = ("next_sequence_length", "cache_position", "position_ids", "token_type_ids")

# Names of the cache in generate(). transformers 5.24 and later say "cache" for every model.
_NEW_NAME = "cache" in inspect.signature(GenerationMixin.prepare_inputs_for_generation).parameters
_CACHE = "cache" if _NEW_NAME else "cache_params"
_CACHE_NAMES = ("cache_params", "past_key_values", "cache")
_OUTPUT_CACHE = "cache" if "cache" in inspect.signature(GenerateDecoderOnlyOutput).parameters else "past_key_values"


class _Later(BaseStreamer):
    """Tells ``_sample`` to return before the loop, which the caller runs."""

    def __init__(self) -> None:
        self.tokens: Iterator[Tensor] | None = None

    def put(self, value: Tensor) -> None:
        """Ignores the prompt."""

    def end(self) -> None:
        """Never called by the loop."""


class xLSTMGenerationMixin(GenerationMixin):
    """``generate`` with a state of fixed size: greedy search, sampling and beam search, from ids or embeddings.

    Greedy search and sampling with a cache take the loop of :mod:`flash_xlstm.models.decoding`, whose results equal
    those of transformers' loop. On CUDA it captures the decoding step once for each batch size in a CUDA graph and
    replays it. Beam search, scores or hidden states to return, and several devices take transformers' loop.

    Attributes:
        use_cuda_graphs: whether steps may be captured. Graphs follow weights that change in place. They are captured
            again for other weights, modules and settings of modules, such as a disabled adapter. Steps run eagerly with
            hooks or with a forward in an instance, which a graph would leave out.
    """

    use_cuda_graphs = True

    def generate(self, inputs: Tensor | None = None, *args: Any, **kwargs: Any) -> Any:
        """As ``GenerationMixin.generate``, which documents every argument.

        To continue from a cache, pass it as `cache_params`; ``return_dict_in_generate=True`` returns it as
        ``past_key_values``. It is advanced in place; pass ``cache.clone()`` to keep it. The inputs are the whole
        sequence, whose beginning the cache has seen, or only the new tokens, with an `attention_mask` that covers the
        whole sequence.

        A returned cache has read all of a row's tokens but the last. The last token of an ended row is its end token:
        the padding after it is not read. There are two ways to continue such a batch. Pass the whole sequence
        (``sequences`` and the new tokens) with an `attention_mask` that is 0 at the padding; each row then reads its
        unread tokens. Or pass each row's last token and its new tokens, padded on the left. In transformers' own loop
        ended rows do read the padding.

        Sampling from logits that hold NaN or inf raises. Greedy search takes the ``argmax``, as in transformers.

        Raises:
            RuntimeError: sampling from NaN logits, or from logits that are all -inf after the processors. On CUDA the
                error may come only at the end.
            TypeError: the cache is not an `xLSTMCache` of this package.
            ValueError: the inputs are not (batch, tokens), embeddings are not (batch, tokens, hidden_size), the cache
                does not fit the inputs, or a prompt ends with padding.
        """
        named = {"inputs_embeds": kwargs.get("inputs_embeds"), "input_ids": kwargs.get("input_ids"), "inputs": inputs}
        given: dict[str, Tensor] = {name: t for name, t in named.items() if t is not None}
        for name, x in {**given, "attention_mask": kwargs.get("attention_mask")}.items():
            axes = "(batch, tokens, hidden_size)" if name == "inputs_embeds" else "(batch, tokens)"
            if x is not None and x.ndim != axes.count(",") + 1:
                raise ValueError(f"{name} is of shape {tuple(x.shape)}; expected {axes}")
        cache = one_cache(**{name: kwargs.pop(name, None) for name in _CACHE_NAMES})
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
            An iterator over the new tokens, each (batch,) on the CPU. It ends where ``generate`` ends. The prompt is
            read before this returns. Closing the iterator early stops the generation.

        Raises:
            ValueError: ``generate`` takes transformers' loop for these arguments, which cannot be iterated over.

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
        """Frees the CUDA graphs, with their memory and states, that decoding keeps for the next call.

        They take at most 256 MiB a model, or a 48th of the GPU's memory if that is more. Larger ones are freed when
        ``generate`` ends. Caches that ``generate`` returned are not freed.
        """
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
        max_length = _max_length(stopping_criteria)
        if max_length is None or not self._loop_serves(generation_config, synced_gpus, model_kwargs):
            if isinstance(streamer, _Later):
                return input_ids
            return super()._sample(
                input_ids, logits_processor, stopping_criteria, generation_config, synced_gpus, streamer, **model_kwargs
            )
        choice = _choice(logits_processor, stopping_criteria, generation_config)
        given = any(isinstance(model_kwargs.get(name), xLSTMCache) for name in _CACHE_NAMES)
        prompt = self.prepare_inputs_for_generation(input_ids, is_first_iteration=True, **model_kwargs)
        outputs = self(**prompt, return_dict=True)
        session = decoding.Session(
            self,
            outputs.cache_params,
            outputs.logits[:, -1].to(input_ids.device, torch.float32),
            input_ids,
            max(1, max_length - input_ids.shape[1]),
            choice,
            keep_cache=given or generation_config.return_dict_in_generate,
            use_graph=self._may_capture(input_ids),
        )
        del outputs, prompt, model_kwargs
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

    def _loop_serves(self, config: Any, synced_gpus: bool, model_kwargs: dict[str, Any]) -> bool:
        outputs = ("output_attentions", "output_hidden_states", "output_scores", "output_logits")
        placed = {str(device) for device in (getattr(self, "hf_device_map", None) or {}).values()}
        return (
            bool(model_kwargs.get("use_cache"))
            and not synced_gpus
            and not any(getattr(config, name, False) for name in outputs)
            and not getattr(config, "prefill_chunk_size", None)
            and not getattr(config, "is_assistant", False)
            and not self.config.output_hidden_states
            and not model_kwargs.get("output_hidden_states")
            and len(placed - {"cpu", "disk"}) < 2  # offloaded parts run on the only other device
        )

    def _may_capture(self, input_ids: Tensor) -> bool:
        return (
            self.use_cuda_graphs
            and input_ids.is_cuda
            and not torch.cuda.is_current_stream_capturing()
            and not any(p.is_meta for p in self.parameters())  # offloaded weights, which hooks load at each step
        )

    def _inputs_device(self, inputs: Tensor) -> torch.device:
        """The device for `inputs`: that of the model's first weight, or any if that is offloaded."""
        device = self.device
        return inputs.device if device.type == "meta" else device

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
        past_key_values: xLSTMCache | None = None,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """The arguments of the next forward pass.

        Args:
            cached_tokens: tokens at the beginning of the inputs that the user's cache has seen.
        """
        cache_params = one_cache(cache_params=cache_params, cache=cache, past_key_values=past_key_values)
        kwargs = {name: value for name, value in kwargs.items() if name not in _UNUSED}
        kwargs.update(cache_params=cache_params, use_cache=use_cache)
        if cache_params is not None and use_cache and not is_first_iteration:
            last = input_ids[:, -1:]
            return {"input_ids": last.to(self._inputs_device(last)), **kwargs}  # new tokens are never padding

        # From embeddings generate() always uses a cache: later passes get token ids only.
        embeds = inputs_embeds if is_first_iteration else None
        name, inputs = ("input_ids", input_ids) if embeds is None else ("inputs_embeds", embeds)
        if cache_params is not None and inputs.shape[0] > cache_params.batch_size:
            # For beams, or several samples of a prompt.
            copies, rest = divmod(inputs.shape[0], cache_params.batch_size)
            if rest:
                raise ValueError(
                    f"cache_params has {cache_params.batch_size} rows, which does not divide the batch of "
                    f"{inputs.shape[0]}"
                )
            cache_params.batch_repeat_interleave(copies)
        seen = None
        if cache_params is not None and cached_tokens and cache_params.unread is not None:
            # Starts at the first token that some row has not read. Rows that have read it see it as padding.
            behind = int(cache_params.unread.max())
            cached_tokens -= behind
            cache_params.set_seq_length(cached_tokens)
            cache_params.unread = cache_params.unread - behind  # each row's position is the same
            seen = -cache_params.unread
        inputs = inputs[:, cached_tokens:]
        inputs = inputs.to(self._inputs_device(inputs))
        if attention_mask is not None:
            attention_mask = attention_mask[:, -inputs.shape[1] :]
        if attention_mask is not None and not torch.compiler.is_compiling() and not attention_mask.is_meta:
            if not attention_mask[:, -1].all():
                raise ValueError(
                    "attention_mask is 0 at the last token of a row: generation goes on behind the last token, so pad "
                    "prompts on the left"
                )
        if seen is not None:
            new = (torch.arange(inputs.shape[1], device=seen.device) >= seen[:, None]).to(inputs.device)
            attention_mask = new if attention_mask is None else new & (attention_mask.to(inputs.device) != 0)
        return {name: inputs, "attention_mask": attention_mask, **kwargs}

    def _update_model_kwargs_for_generation(
        self, outputs: Any, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> dict[str, Any]:
        model_kwargs = super()._update_model_kwargs_for_generation(outputs, model_kwargs, *args, **kwargs)
        # Beam search reorders the cache under these names only.
        if outputs.cache_params is not None:
            model_kwargs["cache" if _NEW_NAME else "past_key_values"] = outputs.cache_params
        return model_kwargs

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        return False


def _max_length(criteria: Any) -> Any:
    """The most tokens of a sequence; None unless the criteria bound the length and nothing else."""
    return min((c.max_length for c in criteria if type(c) is MaxLengthCriteria), default=None)


def _choice(processors: Any, criteria: Any, config: Any) -> decoding.Choice:
    # Exact types only: a subclass may end rows by another rule.
    ends = [criterion for criterion in criteria if type(criterion) is EosTokenCriteria]
    other = [c for c in criteria if type(c) not in (EosTokenCriteria, MaxLengthCriteria)]
    eos = sorted({int(token) for criterion in ends for token in criterion.eos_token_id.flatten().tolist()})
    pad = None
    if any(hasattr(criterion, "eos_token_id") for criterion in criteria):  # the condition in transformers
        pad = getattr(config, "_pad_token_tensor", None)
        if pad is None:
            raise ValueError("pad_token_id is None; rows that a stopping criterion ends at an end token need one")
        pad = int(pad)
    return decoding.Choice(list(processors), bool(config.do_sample), tuple(eos), pad, other)


def _without_gradients(tokens: Iterator[Tensor]) -> Iterator[Tensor]:
    while True:
        with torch.no_grad():
            token = next(tokens, None)
        if token is None:
            return
        yield token
