"""The decoding loop: token after token, from a cache whose tensors keep their addresses.

A step is the model's forward pass, the choice of the token and the check for the end. On CUDA it is captured once for
each batch size in a CUDA graph and replayed for every token. Elsewhere it runs eagerly. The host runs ahead of the
device. It learns of an end token some steps later, and cuts off the tokens after it. A row's state does not change
after its end: it has read all of the row's tokens but the last, and no padding.
"""

from __future__ import annotations

import functools
import numbers
import re
import threading
import warnings
import weakref
from collections import OrderedDict, deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn.modules import module as module_hooks
from transformers.generation import logits_process

from flash_xlstm.models.cache import xLSTMCache
from flash_xlstm.nn.linear import MOST_FEW_ROWS, side_by_side, weights_at_rest

CHUNK = 16  # tokens that a step collects on the device before the host fetches them
CHECK_EVERY = 4  # steps from one check for the end to the next; divides CHUNK
CHECKS_AHEAD = 2  # checks that may be pending
STEPS_TO_CAPTURE = 4  # with fewer tokens capture costs more than it saves
KEPT = 4  # decoders that a model keeps, and graphs of each
# Bytes of states and graphs that a model keeps for the next call: this many, or a 48th of the GPU's memory if that is
# more. The rest is freed at the end of a call and captured again in the next. A row of the 7B model takes 128 MiB.
KEPT_BYTES, KEPT_SHARE = 256 * 2**20, 48
FIRST_ROOM = 256  # room for new tokens at first; doubled as needed

# These read the scores only, and are captured with the step. Others, subclasses included, run between the steps.
_STATIC_PROCESSORS = (
    logits_process.TemperatureLogitsWarper,
    logits_process.TopKLogitsWarper,
    logits_process.TopPLogitsWarper,
    logits_process.MinPLogitsWarper,
    logits_process.TypicalLogitsWarper,
    logits_process.EpsilonLogitsWarper,
    logits_process.LogitNormalization,
    logits_process.InfNanRemoveLogitsProcessor,
)


@dataclass
class Choice:
    """The rule by which a step chooses its token.

    Attributes:
        processors: called in order, with the tokens so far and the scores.
        do_sample: whether to sample from the distribution; otherwise the likeliest token is chosen.
        eos: tokens that end a row; may be empty.
        pad: the token that follows in ended rows. None: they continue with chosen tokens until all rows have ended.
        criteria: called with the tokens so far and None. They return which rows end: (batch,) booleans, or one for all.
    """

    processors: list[Any] = field(default_factory=list)
    do_sample: bool = False
    eos: tuple[int, ...] = ()
    pad: int | None = None
    criteria: list[Any] = field(default_factory=list)

    @property
    def can_end(self) -> bool:
        return bool(self.eos or self.criteria)

    @property
    def key(self) -> tuple | None:
        """A key that is equal for choices that share a captured step. None where a step needs the tokens so far."""
        if self.criteria:
            return None
        parts: list[Any] = [self.do_sample, self.eos, self.pad]
        for processor in self.processors:
            kind, settings = type(processor), sorted(vars(processor).items())
            if kind not in _STATIC_PROCESSORS or not all(isinstance(v, numbers.Number) for _, v in settings):
                return None
            parts.append((kind, *settings))
        return tuple(parts)


class Message:
    """An asynchronous copy of a small tensor to the host."""

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
        """Whether the copy has finished, so that `read` does not wait."""
        return self._event is None or self._event.query()

    def read(self) -> list[int]:
        """The values."""
        if self._event is not None:
            self._event.synchronize()
        return self._value.tolist()


class Decoder:
    """The tensors of a step for one model and batch size, and the graphs captured over them.

    Attributes:
        cache: the states that a step advances.
        token: (batch, 1), the last token read.
        unfinished: (batch,) bool, rows that have not ended.
        invalid: (batch,) bool, rows that had an invalid distribution to sample from.
        counts: (batch,), tokens chosen before each row's end.
        slots: (batch,) int32, the index of each row's state; -1 for an ended row.
        chunk: (batch, CHUNK), the tokens of the last steps; `cursor` (1,) is the next column.
        inputs_on: the device of the model's inputs.
    """

    def __init__(self, batch: int, device: torch.device) -> None:
        new = lambda *shape: torch.zeros(shape, dtype=torch.int64, device=device)  # noqa: E731
        self.token, self.chunk, self.cursor, self.counts = new(batch, 1), new(batch, CHUNK), new(1), new(batch)
        self.unfinished = torch.ones(batch, dtype=torch.bool, device=device)
        self.invalid = torch.zeros(batch, dtype=torch.bool, device=device)
        self.rows = torch.arange(batch, dtype=torch.int32, device=device)
        self.slots = self.rows.clone()
        self.inputs_on = device
        self.cache: xLSTMCache | None = None
        self._own_cache: xLSTMCache | None = None
        self._eos: dict[tuple[int, ...], Tensor] = {}
        self._graphs: OrderedDict[tuple, tuple[torch.cuda.CUDAGraph, Tensor]] = OrderedDict()
        self._graph_bytes = 0

    @property
    def nbytes(self) -> int:
        """The bytes of memory that the decoder holds."""
        return self._graph_bytes + (0 if self._own_cache is None else self._own_cache.nbytes)

    def reset(self, *, going: bool = True) -> None:
        """Resets the tensors for a first token. With `going` False, steps leave the states unchanged."""
        for t in (self.cursor, self.counts, self.invalid):
            t.zero_()
        self.unfinished.fill_(going)
        self._freeze()

    def forward(self, model: Any) -> Tensor:
        """Reads the token. Returns the next token's float32 logits, (batch, vocab), on the token's device."""
        token = self.token.to(self.inputs_on)
        output = model(input_ids=token, cache_params=self.cache, use_cache=True, return_dict=True)
        return output.logits[:, -1].to(self.token.device, torch.float32)

    def choose(self, logits: Tensor, choice: Choice, tokens: Tensor | None = None) -> None:
        """Chooses the next token. `tokens` are the tokens so far, for processors and criteria that read them."""
        scores = logits
        for processor in choice.processors:
            scores = processor(tokens, scores)
        if choice.do_sample:
            # The method of torch.multinomial, without its check of the probabilities, which waits for the GPU.
            probabilities = torch.softmax(scores, dim=-1)
            new = (probabilities / torch.empty_like(probabilities).exponential_(1)).argmax(-1)
            nan = probabilities[:, 0].isnan()  # a row's probabilities are all NaN, or none is
            self.invalid |= nan if choice.pad is None else nan & self.unfinished
        else:
            new = scores.argmax(-1)
        if choice.can_end:
            self.counts += self.unfinished.any() if choice.pad is None else self.unfinished
        if choice.pad is not None:
            new = new.masked_fill(~self.unfinished, choice.pad)
        if choice.eos:
            if choice.eos not in self._eos:  # before capture, which refuses the copy
                self._eos[choice.eos] = torch.tensor(choice.eos, device=new.device)
            self.unfinished &= (new[:, None] != self._eos[choice.eos]).all(-1)
        self.token.copy_(new[:, None])
        self.chunk.index_copy_(1, self.cursor, self.token)
        self.cursor.add_(1).remainder_(CHUNK)
        if choice.eos and not choice.criteria:
            self._freeze()

    def end_rows(self, criterion: Any, tokens: Tensor, choice: Choice) -> None:
        """Ends the rows for which a stopping criterion is true on `tokens` (batch, length)."""
        given, batch = criterion(tokens, None), len(self.rows)
        try:
            ended = torch.as_tensor(given, device=self.unfinished.device) != 0
            ended = ended.reshape(()) if ended.numel() == 1 else ended.reshape(batch)
        except (TypeError, ValueError, RuntimeError) as error:
            found = f"a tensor of shape {tuple(given.shape)}" if isinstance(given, Tensor) else repr(given)
            raise TypeError(
                f"the stopping criterion {type(criterion).__name__} gave {found}; it must be {batch} booleans, one for "
                "each row, or one for all"
            ) from error
        self.unfinished &= ~ended
        if choice.pad is not None:  # otherwise all rows continue
            self._freeze()

    def _freeze(self) -> None:
        self.slots.copy_(self.rows.masked_fill(~self.unfinished, -1))

    def check(self) -> None:
        """Raises RuntimeError where a distribution to sample from was invalid. Waits for the device."""
        if self.invalid.any():
            raise RuntimeError(
                f"cannot sample: for row(s) {self.invalid.nonzero()[:, 0].tolist()} the logits hold NaN or inf, or all "
                "are -inf, after the logits processors"
            )

    def message(self) -> Message:
        """The token of every row, then whether any row continues, then whether to call `check`."""
        flags = torch.stack([self.unfinished.any(), self.invalid.any()])
        return Message(torch.cat([self.token[:, 0], flags.long()]))

    def adopt(self, cache: xLSTMCache) -> None:
        """Steps advance `cache` itself. Graphs captured over it are valid as long as it lives."""
        self.cache = cache
        cache.slots = self.slots

    def own(self, cache: xLSTMCache, *, give: bool) -> None:
        """Steps advance the decoder's own cache, whose addresses graphs rely on. It starts as a copy of `cache`. With
        `give` a decoder without a cache takes over `cache` itself."""
        if self._own_cache is not None:
            self._own_cache.copy_(cache)
        else:
            self._own_cache = cache if give else cache.clone()
        self.adopt(self._own_cache)

    def free(self) -> None:
        """Drops the graphs and the cache."""
        self.cache, self._own_cache, self._graph_bytes = None, None, 0
        self._graphs.clear()

    def graph(self, model: Any, choice: Choice) -> tuple[torch.cuda.CUDAGraph, Tensor]:
        """A captured step and its logits. The choice of the token is left out where it needs the tokens so far. Capture
        overwrites every tensor of the decoder except the states."""
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
        streams = _side_streams(device) if len(self.rows) > MOST_FEW_ROWS else ()
        with _capturing, side_by_side(streams):
            random_state = torch.cuda.get_rng_state(device)
            try:
                stream = _capture_stream(device)
                stream.wait_stream(torch.cuda.current_stream(device))
                with torch.cuda.stream(stream):
                    self.reset(going=False)
                    for _ in range(2):  # the first call initializes libraries, which capture refuses
                        step()
                torch.cuda.current_stream(device).wait_stream(stream)
                graph = torch.cuda.CUDAGraph()
                with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
                    before = torch.cuda.memory_reserved(device)
                    with weights_at_rest():
                        logits = step()
                self._graph_bytes += max(0, torch.cuda.memory_reserved(device) - before)
            finally:
                torch.cuda.set_rng_state(random_state, device)
        self._graphs[key] = graph, logits
        while len(self._graphs) > KEPT:
            self._graphs.popitem(last=False)
        return graph, logits


_capturing = threading.Lock()


@functools.cache
def _capture_stream(device: torch.device) -> torch.cuda.Stream:
    """One stream for all captures: cuBLAS keeps a workspace of 32 MiB for every stream."""
    return torch.cuda.Stream(device)


@functools.cache
def _side_streams(device: torch.device) -> tuple[torch.cuda.Stream, ...]:
    """Streams for the products of one input (q, k, v, output gate); the current stream takes one of the four."""
    return torch.cuda.Stream(device), torch.cuda.Stream(device), torch.cuda.Stream(device)


def _weights_key(model: Any) -> tuple:
    """A key that changes when a graph over the model is out of date: with the weights, the modules, their classes'
    forwards, or a module's settings (training mode, an adapter's scale, whether an adapter is disabled)."""
    autocast = torch.is_autocast_enabled("cuda") and torch.get_autocast_dtype("cuda")
    weights = ((t.data_ptr(), t.dtype) for t in model.parameters())
    modules = ((type(m), type(m).forward, *map(_setting, vars(m).values())) for m in model.modules())
    return (autocast, *weights, *modules)


def _setting(value: Any) -> Any:
    """A comparable copy of a value, or None. Numbers, strings, and lists and dicts of them are comparable, such as
    active adapters and their scales."""
    plain = bool, int, float, str
    if isinstance(value, plain):
        return value
    parts = value.values() if type(value) is dict else value if type(value) is list else ()
    return repr(value) if all(isinstance(part, plain) for part in parts) and parts else None


def looked_at(model: Any) -> str | None:
    """The name of a module whose call runs more Python than its class's forward: a hook, or a forward in the instance.
    A replayed graph would leave that out. None where there is no such module."""
    if module_hooks._global_forward_hooks or module_hooks._global_forward_pre_hooks:
        return "a hook of all modules"
    for name, module in model.named_modules():
        own = vars(module)
        if own["_forward_hooks"] or own["_forward_pre_hooks"] or "forward" in own or "_call_impl" in own:
            return name or "the model"
    return None


def kept_bytes(device: torch.device) -> int:
    """The most bytes that a model keeps on the device for the next call."""
    if device.type != "cuda":
        return KEPT_BYTES
    return max(KEPT_BYTES, torch.cuda.get_device_properties(device).total_memory // KEPT_SHARE)


class _Decoders:
    """The idle decoders of a model, by batch size and the other properties that their tensors depend on."""

    def __init__(self) -> None:
        self._idle: OrderedDict[tuple, Decoder] = OrderedDict()
        self._warned: set[tuple] = set()

    def take(self, key: tuple, batch: int, device: torch.device) -> Decoder:
        return self._idle.pop(key, None) or Decoder(batch, device)

    def keep(self, key: tuple, decoder: Decoder) -> None:
        """Keeps a decoder for the next call. Others that were used longer ago may be dropped."""
        room = kept_bytes(decoder.token.device)
        if decoder.nbytes > room:
            return
        self._idle.pop(key, None)
        self._idle[key] = decoder
        while len(self._idle) > KEPT or sum(idle.nbytes for idle in self._idle.values()) > room:
            self._idle.popitem(last=False)

    def warn(self, why: str, *kind: object) -> None:
        """Warns that steps are not captured, once for each `kind` up to the numbers in it."""
        key = tuple(re.sub(r"[\d.]+", "", str(part)) for part in kind)
        if key not in self._warned:
            self._warned.add(key)
            warnings.warn(
                f"decoding runs without a CUDA graph, which is slower: {why}. With model.use_cuda_graphs = False no "
                "call tries to",
                stacklevel=2,
            )


# Not attributes of the models, which may be copied and pickled.
_decoders: weakref.WeakKeyDictionary[Any, _Decoders] = weakref.WeakKeyDictionary()


def release(model: Any) -> None:
    """Frees the states and graphs kept for `model`. Those in use are freed when their generation ends."""
    _decoders.pop(model, None)


class Session:
    """One generation: from the prompt's logits to the last token.

    Args:
        model: the model.
        cache: the states after the prompt; advanced in place.
        logits: (batch, vocab), float32, of the first new token.
        tokens: (batch, length), the prompt, with which the result begins.
        max_new_tokens: at least 1.
        choice: how tokens are chosen.
        keep_cache: whether the caller reads `cache` afterwards. Otherwise the session may free it.
        use_graph: whether steps may be captured.

    Attributes:
        sequences: (batch, tokens), the prompt and, after :meth:`run`, what was generated.
    """

    def __init__(
        self,
        model: Any,
        cache: xLSTMCache,
        logits: Tensor,
        tokens: Tensor,
        max_new_tokens: float,
        choice: Choice,
        *,
        keep_cache: bool,
        use_graph: bool,
    ) -> None:
        self.model, self.cache, self.choice = model, cache, choice
        self.keep_cache, self.use_graph = keep_cache, use_graph
        self.prompt_length, self.max_new_tokens = tokens.shape[1], max_new_tokens
        self.sequences = tokens
        self.made = 0  # new tokens in `sequences`, or being copied there
        self._first_logits: Tensor | None = logits
        self._length_before = cache.get_seq_length()

    def run(self, *, each: bool = False) -> Iterator[Tensor]:
        """Generates the tokens. With `each` it yields every token, (batch,) on the CPU, as it arrives; otherwise
        nothing.

        Afterwards, also if the iterator is closed early, `sequences` ends at the last row's end, and the cache has read
        all but its last token.

        Raises:
            RuntimeError: the logits hold NaN, so that there is no distribution to sample from.
        """
        batch, device = self.sequences.shape[0], self.sequences.device
        decoders = _decoders.setdefault(self.model, _Decoders())
        key = (batch, device, self.cache.dtype, torch.is_inference_mode_enabled())
        kept = self.cache.nbytes <= kept_bytes(device)  # otherwise the states are not kept, and a copy is useless
        decoder = decoders.take(key, batch, device) if kept else Decoder(batch, device)
        decoder.inputs_on = self.model._inputs_device(self.sequences)
        try:
            step = self._step(decoders, decoder, kept)
            decoder.reset()
            try:
                yield from self._loop(decoder, step, each)
            except GeneratorExit:
                self._finish(decoder)
                raise
            if self.choice.do_sample:
                decoder.check()
            self._finish(decoder)
        finally:
            if decoder.cache is not None:
                decoder.cache.slots = None
                decoder.cache = None
            if kept:
                decoders.keep(key, decoder)

    def _step(self, decoders: _Decoders, decoder: Decoder, kept: bool) -> Callable[[], Tensor]:
        """The function that reads a token and returns the logits. With a static choice it also chooses the next
        token."""
        model, choice = self.model, self.choice
        captured = None
        capture = self.use_graph and self.max_new_tokens > STEPS_TO_CAPTURE
        if capture and (place := looked_at(model)) is not None:
            decoders.warn(f"{place} has a hook or a forward of its own, which a graph would leave out", place)
            capture = False
        if capture:
            try:
                if kept:
                    decoder.own(self.cache, give=not self.keep_cache)
                else:
                    decoder.adopt(self.cache)
                if not self.keep_cache:
                    assert decoder.cache is not None
                    self.cache = decoder.cache  # frees the prompt's cache if it is another one
                captured = decoder.graph(model, choice)
            except Exception as error:
                decoders.warn(f"capturing it failed ({error}); the next call tries again", type(error), error)
            if captured is None:  # outside `except`, where the error keeps no half-made graph alive
                decoder.free()
                torch.cuda.synchronize()
                torch.cuda.empty_cache()
        if captured is None:
            decoder.adopt(self.cache)
        else:
            graph, logits = captured

        def step() -> Tensor:
            if captured is not None:
                graph.replay()
                return logits
            read = decoder.forward(model)
            if choice.key is not None:
                decoder.choose(read, choice)
            return read

        return step

    def _loop(self, decoder: Decoder, step: Callable[[], Tensor], each: bool) -> Iterator[Tensor]:
        choice = self.choice
        static = choice.key is not None
        at_once = choice.do_sample and not decoder.token.is_cuda
        messages: deque[Message] = deque()
        logits, self._first_logits = self._first_logits, None
        assert logits is not None
        if static:
            decoder.choose(logits, choice)
        else:
            self._choose_dynamically(decoder, logits)
        while True:
            self.made += 1
            if at_once:
                decoder.check()
            if static and self.made % CHUNK == 0:
                self._fetch(decoder, CHUNK)
            last = self.made >= self.max_new_tokens
            if each or (choice.can_end and self.made % CHECK_EVERY == 0) or choice.criteria:
                messages.append(decoder.message())
            ahead = 0 if last or choice.criteria else CHECKS_AHEAD
            while messages and (len(messages) > ahead or messages[0].ready()):
                *tokens, going, invalid = messages.popleft().read()
                if invalid:
                    return
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
        self._make_room(length + 1)
        self.sequences[:, length] = decoder.token[:, 0]
        for criterion in self.choice.criteria:
            decoder.end_rows(criterion, self.sequences[:, : length + 1], self.choice)

    def _make_room(self, length: int) -> None:
        """Makes room for `length` tokens in `sequences`. It grows as it fills, because most generations end early."""
        batch, room = self.sequences.shape
        if length > room:
            new = max(FIRST_ROOM, room - self.prompt_length)
            room = max(length, int(min(self.prompt_length + self.max_new_tokens, room + new)))
            sequences = self.sequences.new_empty(batch, room)
            sequences[:, : self.sequences.shape[1]] = self.sequences
            self.sequences = sequences

    def _fetch(self, decoder: Decoder, count: int) -> None:
        """Copies the last `count` tokens from the beginning of the decoder's chunk."""
        end = self.prompt_length + self.made
        self._make_room(end)
        self.sequences[:, end - count : end] = decoder.chunk[:, :count]

    def _finish(self, decoder: Decoder) -> None:
        if self.choice.key is not None and self.made % CHUNK:
            self._fetch(decoder, self.made % CHUNK)
        counts = None
        if self.choice.can_end:
            counts = decoder.counts.clamp(max=self.made)
            self.made = int(counts.max())
        # A copy, which does not keep the spare room.
        self.sequences = self.sequences[:, : self.prompt_length + self.made].clone()
        assert decoder.cache is not None
        if self.keep_cache and decoder.cache is not self.cache:
            self.cache.copy_(decoder.cache)
        # All but the last token have been read; the host's count of the steps may be larger.
        self.cache.set_seq_length(self._length_before + self.made - 1)
        if counts is not None and self.keep_cache and bool((counts < self.made).any()):
            self.cache.unread = self.made - counts
