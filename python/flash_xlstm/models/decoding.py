"""The decoding loop: token after token from a cache whose tensors stay where they are.

On CUDA a step (the model's forward pass, the choice of the token, the check for the end) is captured once for each
batch size in a CUDA graph and replayed for every token; elsewhere the same step runs as it is. The host runs ahead of
the device: it learns of an end token some steps later, and the tokens behind it are cut off. From the step after the
end on the states stay as they are, so that the cache ends where it would have in a loop that looks at every token.
"""

from __future__ import annotations

import numbers
import warnings
import weakref
from collections import OrderedDict, deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from flash_xlstm.models.cache import xLSTMCache

CHUNK = 16  # tokens that a step collects on the device before the host fetches them
CHECK_EVERY = 4  # steps from one look for the end to the next; divides CHUNK
CHECKS_AHEAD = 2  # looks that may be under way
STEPS_TO_CAPTURE = 4  # fewer do not pay for capturing
KEPT = 4  # decoders, and graphs of each, that a model keeps

# These look at the scores only, and are captured with the step; others run between the steps.
_STATIC_PROCESSORS = (
    "TemperatureLogitsWarper",
    "TopKLogitsWarper",
    "TopPLogitsWarper",
    "MinPLogitsWarper",
    "TypicalLogitsWarper",
    "EpsilonLogitsWarper",
    "LogitNormalization",
    "InfNanRemoveLogitsProcessor",
)


@dataclass
class Choice:
    """How a step chooses its token.

    Attributes:
        processors: called with the tokens so far and the scores, one after the other.
        do_sample: draw from the distribution, or take the likeliest.
        eos: tokens that end a row; empty for none.
        pad: what ended rows go on with.
        criteria: called with the tokens so far and None; give the rows (batch,) that end.
    """

    processors: list[Any] = field(default_factory=list)
    do_sample: bool = False
    eos: tuple[int, ...] = ()
    pad: int = 0
    criteria: list[Any] = field(default_factory=list)

    @property
    def can_end(self) -> bool:
        return bool(self.eos or self.criteria)

    @property
    def key(self) -> tuple | None:
        """Equal for choices that a captured step makes alike; None where a step needs the tokens so far."""
        if self.criteria:
            return None
        parts: list[Any] = [self.do_sample, self.eos, self.pad]
        for processor in self.processors:
            name, settings = type(processor).__name__, sorted(vars(processor).items())
            if name not in _STATIC_PROCESSORS or not all(isinstance(v, numbers.Number) for _, v in settings):
                return None
            parts.append((name, *settings))
        return tuple(parts)


class Message:
    """A small tensor on its way to the host."""

    def __init__(self, tensor: Tensor) -> None:
        self._event = None
        if tensor.is_cuda:
            self._value = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
            self._value.copy_(tensor, non_blocking=True)
            self._event = torch.cuda.Event()
            self._event.record()
        else:
            self._value = tensor.clone()

    def ready(self) -> bool:
        """Whether `read` would not wait."""
        return self._event is None or self._event.query()

    def read(self) -> list[int]:
        """The values."""
        if self._event is not None:
            self._event.synchronize()
        return self._value.tolist()


class Decoder:
    """The tensors of a step, for one model and batch size, and the graphs captured over them.

    Attributes:
        cache: the states that a step advances.
        token: (batch, 1), the token read last.
        unfinished: (batch,) bool, the rows that have not ended.
        count: (), how many tokens were chosen while some row had not ended.
        chunk: (batch, CHUNK), the tokens of the last steps; `cursor` (1,) is where the next one goes.
    """

    def __init__(self, batch: int, device: torch.device) -> None:
        new = lambda *shape: torch.zeros(shape, dtype=torch.int64, device=device)  # noqa: E731
        self.token, self.chunk, self.cursor, self.count = new(batch, 1), new(batch, CHUNK), new(1), new()
        self.unfinished = torch.ones(batch, dtype=torch.bool, device=device)
        self.rows = torch.arange(batch, dtype=torch.int32, device=device)
        self.slots = self.rows.clone()  # the rows' states; -1 once all rows have ended
        self.cache: xLSTMCache | None = None
        self._own_cache: xLSTMCache | None = None
        self._eos: dict[tuple[int, ...], Tensor] = {}
        self._graphs: OrderedDict[tuple, tuple[torch.cuda.CUDAGraph, Tensor]] = OrderedDict()

    def reset(self) -> None:
        """Before the first token."""
        for t in (self.cursor, self.count):
            t.zero_()
        self.unfinished.fill_(True)
        self.slots.copy_(self.rows)

    def forward(self, model: Any) -> Tensor:
        """Reads the token; float32 logits (batch, vocab) of the next."""
        output = model(input_ids=self.token, cache_params=self.cache, use_cache=True, return_dict=True)
        return output.logits[:, -1].float()

    def choose(self, logits: Tensor, choice: Choice, tokens: Tensor | None = None) -> None:
        """Chooses the next token; `tokens` are those so far, for processors and criteria that look at them."""
        scores = logits
        for processor in choice.processors:
            scores = processor(tokens, scores)
        if choice.do_sample:
            # torch.multinomial's own way to draw one, without its check of the probabilities, which waits for the GPU.
            probabilities = torch.softmax(scores, dim=-1)
            new = (probabilities / torch.empty_like(probabilities).exponential_(1)).argmax(-1)
        else:
            new = scores.argmax(-1)
        if choice.can_end:
            self.count += self.unfinished.any()
        if choice.eos:
            if choice.eos not in self._eos:  # before capture, which would refuse the copy
                self._eos[choice.eos] = torch.tensor(choice.eos, device=new.device)
            eos = self._eos[choice.eos]
            new = new.masked_fill(~self.unfinished, choice.pad)
            self.unfinished &= (new[:, None] != eos).all(-1)
        self.token.copy_(new[:, None])
        self.chunk.index_copy_(1, self.cursor, self.token)
        self.cursor.add_(1).remainder_(CHUNK)
        if choice.eos and not choice.criteria:
            self._freeze()

    def end_rows(self, ended: Tensor) -> None:
        """Ends the rows where `ended` (batch,) is true."""
        self.unfinished &= ~ended.to(self.unfinished.device)
        self._freeze()

    def _freeze(self) -> None:
        self.slots.copy_(self.rows.masked_fill(~self.unfinished.any(), -1))

    def message(self) -> Message:
        """The token of every row, then whether some row has not ended."""
        return Message(torch.cat([self.token[:, 0], self.unfinished.any()[None].long()]))

    def adopt(self, cache: xLSTMCache) -> None:
        """Steps advance `cache` itself."""
        self.cache = cache
        cache.slots = self.slots

    def own(self, config: Any, dtype: torch.dtype) -> None:
        """Steps advance a cache of the decoder's own, whose addresses graphs can rely on."""
        if self._own_cache is None:
            self._own_cache = xLSTMCache(config, len(self.rows), dtype, self.token.device)
            self._own_cache.slots = self.slots
        self.cache = self._own_cache

    def graph(self, model: Any, choice: Choice) -> tuple[torch.cuda.CUDAGraph, Tensor]:
        """A captured step and its logits; without the choice of the token where that needs the tokens so far. Leaves
        rubbish in every tensor of the decoder."""
        key = (choice.key, _weights_key(model))
        if key in self._graphs:
            self._graphs.move_to_end(key)
            return self._graphs[key]

        def step() -> Tensor:
            logits = self.forward(model)
            if choice.key is not None:
                self.choose(logits, choice)
            return logits

        device = self.token.device
        random_state = torch.cuda.get_rng_state(device)
        try:
            stream = torch.cuda.Stream(device)
            stream.wait_stream(torch.cuda.current_stream(device))
            with torch.cuda.stream(stream):
                self.reset()
                for _ in range(2):  # what libraries set up at their first call cannot be captured
                    step()
            torch.cuda.current_stream(device).wait_stream(stream)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
                logits = step()
        finally:
            torch.cuda.set_rng_state(random_state, device)
        self._graphs[key] = graph, logits
        while len(self._graphs) > KEPT:
            self._graphs.popitem(last=False)
        return graph, logits


def _weights_key(model: Any) -> tuple:
    """Changes when a graph over the model's weights would be out of date."""
    autocast = torch.is_autocast_enabled("cuda") and torch.get_autocast_dtype("cuda")
    return (autocast, model.training, *((t.data_ptr(), t.dtype) for t in model.parameters()))


class _Decoders:
    """The decoders of a model that are not in use, by batch size and what else their tensors depend on."""

    def __init__(self) -> None:
        self._idle: OrderedDict[tuple, Decoder] = OrderedDict()
        self.can_capture = True

    def take(self, key: tuple, batch: int, device: torch.device) -> Decoder:
        return self._idle.pop(key, None) or Decoder(batch, device)

    def keep(self, key: tuple, decoder: Decoder) -> None:
        self._idle[key] = decoder
        while len(self._idle) > KEPT:
            self._idle.popitem(last=False)


# Not attributes of the models: those can be copied and pickled.
_decoders: weakref.WeakKeyDictionary[Any, _Decoders] = weakref.WeakKeyDictionary()


def release(model: Any) -> None:
    """Frees the states and graphs kept for `model`."""
    _decoders.pop(model, None)


class Session:
    """One generation: from the prompt's logits to the last token.

    Args:
        model: the model.
        cache: the states after the prompt; advanced in place.
        logits: (batch, vocab), float32, of the first new token.
        tokens: (batch, length) prompt, which the result begins with.
        max_new_tokens: at least 1.
        choice: how tokens are chosen.
        keep_cache: whether `cache` is looked at afterwards.
        use_graph: whether steps may be captured.
    """

    def __init__(
        self,
        model: Any,
        cache: xLSTMCache,
        logits: Tensor,
        tokens: Tensor,
        max_new_tokens: int,
        choice: Choice,
        *,
        keep_cache: bool,
        use_graph: bool,
    ) -> None:
        self.model, self.cache, self.logits, self.choice = model, cache, logits, choice
        self.keep_cache, self.use_graph = keep_cache, use_graph
        self.prompt_length, self.max_new_tokens = tokens.shape[1], max_new_tokens
        self.sequences = tokens.new_empty(tokens.shape[0], tokens.shape[1] + max_new_tokens)
        self.sequences[:, : self.prompt_length] = tokens
        self.made = 0  # new tokens in `sequences`, or on their way there
        self._length_before = cache.get_seq_length()

    def run(self, *, each: bool = False) -> Iterator[Tensor]:
        """Makes the tokens. With `each`, gives every token (batch,) on the CPU as it arrives; else nothing.

        Afterwards `sequences` ends where the last row did.
        """
        batch, device = self.sequences.shape[0], self.logits.device
        decoders = _decoders.setdefault(self.model, _Decoders())
        key = (batch, device, self.cache.dtype, torch.is_inference_mode_enabled())
        decoder = decoders.take(key, batch, device)
        try:
            step = self._step(decoders, decoder)
            decoder.reset()
            yield from self._loop(decoder, step, each)
            self._finish(decoder)
        finally:
            if decoder.cache is self.cache:
                self.cache.slots = None
                decoder.cache = None
            decoders.keep(key, decoder)

    def _step(self, decoders: _Decoders, decoder: Decoder) -> Callable[[], Tensor]:
        """What reads a token and gives the logits; with a static choice also chooses the next."""
        model, choice = self.model, self.choice
        if self.use_graph and decoders.can_capture and self.max_new_tokens > STEPS_TO_CAPTURE:
            try:
                decoder.own(model.config, self.cache.dtype)
                graph, logits = decoder.graph(model, choice)
            except Exception as error:
                decoders.can_capture = False
                warnings.warn(
                    f"decoding runs without a CUDA graph, which is slower: capturing it failed ({error})", stacklevel=2
                )
                torch.cuda.synchronize()
            else:
                assert decoder.cache is not None
                decoder.cache.copy_(self.cache)

                def replay() -> Tensor:
                    graph.replay()
                    return logits

                return replay
        decoder.adopt(self.cache)

        def eager() -> Tensor:
            logits = decoder.forward(model)
            if choice.key is not None:
                decoder.choose(logits, choice)
            return logits

        return eager

    def _loop(self, decoder: Decoder, step: Callable[[], Tensor], each: bool) -> Iterator[Tensor]:
        choice = self.choice
        static = choice.key is not None
        messages: deque[Message] = deque()
        if static:
            decoder.choose(self.logits, choice)
        else:
            self._choose_dynamically(decoder, self.logits)
        while True:
            self.made += 1
            if static and self.made % CHUNK == 0:
                self._fetch(decoder, CHUNK)
            last = self.made == self.max_new_tokens
            if each or (choice.can_end and self.made % CHECK_EVERY == 0) or choice.criteria:
                messages.append(decoder.message())
            ahead = 0 if last or choice.criteria else CHECKS_AHEAD
            while messages and (len(messages) > ahead or messages[0].ready()):
                *tokens, going = messages.popleft().read()
                if each:
                    yield torch.tensor(tokens)
                if not going:
                    return
            if last:
                return
            logits = step()
            if not static:
                self._choose_dynamically(decoder, logits)

    def _choose_dynamically(self, decoder: Decoder, logits: Tensor) -> None:
        length = self.prompt_length + self.made
        decoder.choose(logits.clone(), self.choice, self.sequences[:, :length])
        self.sequences[:, length] = decoder.token[:, 0]
        for criterion in self.choice.criteria:
            decoder.end_rows(criterion(self.sequences[:, : length + 1], None))

    def _fetch(self, decoder: Decoder, count: int) -> None:
        """Copies the last `count` tokens, the beginning of the decoder's chunk."""
        end = self.prompt_length + self.made
        self.sequences[:, end - count : end] = decoder.chunk[:, :count]

    def _finish(self, decoder: Decoder) -> None:
        if self.choice.key is not None and self.made % CHUNK:
            self._fetch(decoder, self.made % CHUNK)
        if self.choice.can_end:
            self.made = min(self.made, int(decoder.count))
        self.sequences = self.sequences[:, : self.prompt_length + self.made]
        assert decoder.cache is not None
        if self.keep_cache and decoder.cache is not self.cache:
            self.cache.copy_(decoder.cache)
        # All but the last token have been read, whatever the host's count of the steps says.
        self.cache.set_seq_length(self._length_before + self.made - 1)
