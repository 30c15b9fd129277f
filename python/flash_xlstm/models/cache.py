"""The recurrent states of an xLSTM model between forward passes."""

from __future__ import annotations

import dataclasses
import json
import numbers
import os
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.utils import _pytree as pytree

from flash_xlstm.models.configuration_xlstm import xLSTMConfig
from flash_xlstm.nn.state import checked_rows, fresh_rows

State = tuple[Tensor, Tensor, Tensor]

_FORMAT = "flash_xlstm cache 1"
# Of the tensors in its files, by safetensors' names.
_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


class xLSTMCache:
    """The recurrent states of all layers. Their size does not depend on the number of tokens seen.

    A forward pass with a cache continues from it and advances it. Without gradients the tensors are written in place,
    and their addresses stay. With gradients they are replaced, and autograd's saved tensors stay intact.

    Args:
        config: the model's configuration.
        max_batch_size: the batch size.
        dtype: of the matrix memory; default ``config.inference_state_dtype``. The rest is float32.
        device: default: torch's.

    Raises:
        TypeError, ValueError: `config` or `max_batch_size` is not as above.

    Attributes:
        rnn_state: for each layer ``(c, n, m)``: matrix memory c (batch, heads, qk_head_dim, v_head_dim),
            normalizer n (batch, heads, qk_head_dim), stabilizer m (batch, heads).
        slots: None, or (batch,) int32: for a forward pass of one token, the row of the states that each row uses; -1
            leaves a row out.
        unread: None, or (batch,) int64: how many of the last tokens seen each row has not read. ``generate`` sets it
            where rows of a batch ended early; the next forward pass clears it.

    As a PyTree (torch.export uses it) a cache is the states of all layers in order, then its length, an int. Export a
    step for any length with a dynamic length:
    ``dynamic_shapes={..., "cache_params": [*[None] * (3 * layers), torch.export.Dim.DYNAMIC]}``.

    Example::

        cache = xLSTMCache(model.config, max_batch_size=1, device=model.device)
        out = model(input_ids, cache_params=cache)
        out = model(next_ids, cache_params=cache)  # continues
    """

    is_compileable = False  # read by GenerationMixin
    slots: Tensor | None = None
    unread: Tensor | None = None

    def __init__(
        self,
        config: xLSTMConfig,
        max_batch_size: int,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        **kwargs: Any,
    ) -> None:
        check_count("max_batch_size", max_batch_size, 0)
        try:
            self.dtype = getattr(torch, config.inference_state_dtype) if dtype is None else dtype
            c_shape = (max_batch_size, config.num_heads, config.qk_head_dim, config.v_head_dim)
            layers = config.num_hidden_layers
        except AttributeError as error:
            raise TypeError(
                f"config is a {type(config).__name__}, without {error.name}; it must be a model's xLSTMConfig"
            ) from None
        self.rnn_state: dict[int, State] = {
            layer: (
                torch.zeros(c_shape, dtype=self.dtype, device=device),
                torch.zeros(c_shape[:3], dtype=torch.float32, device=device),
                torch.zeros(c_shape[:2], dtype=torch.float32, device=device),
            )
            for layer in range(layers)
        }
        self._seq_length = 0

    @classmethod
    def from_states(cls, states: Iterable[State], dtype: torch.dtype, seq_length: int) -> xLSTMCache:
        """A cache that holds these states of all layers, after `seq_length` tokens."""
        cache = cls.__new__(cls)
        cache.dtype = dtype
        cache.rnn_state = {layer: (c.to(dtype), n, m) for layer, (c, n, m) in enumerate(states)}
        cache._seq_length = seq_length
        return cache

    @property
    def batch_size(self) -> int:
        """The number of rows."""
        return self.rnn_state[0][0].shape[0]

    @property
    def nbytes(self) -> int:
        """The size of the states in bytes."""
        return sum(t.nbytes for state in self.rnn_state.values() for t in state)

    @property
    def seqlen_offset(self) -> int:
        """The number of tokens seen, padding included."""
        return self._seq_length

    @property
    def is_linear(self) -> list[bool]:
        """False for each layer: no state grows with the sequence. Read by GenerationMixin."""
        return [True] * len(self.rnn_state)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """The number of tokens seen, padding included. It is the same for every layer."""
        return self._seq_length

    def set_seq_length(self, length: int) -> None:
        """Sets the number of tokens seen."""
        self._seq_length = length

    def check(self, config: xLSTMConfig | _Shape, batch_size: int) -> None:
        """Checks that the cache fits a model and a batch.

        Raises:
            ValueError: it does not.
        """
        c_shape = (batch_size, config.num_heads, config.qk_head_dim, config.v_head_dim)
        found = tuple(self.rnn_state[0][0].shape)
        if found != c_shape or len(self.rnn_state) != config.num_hidden_layers:
            raise ValueError(
                f"cache_params has {len(self.rnn_state)} layers of shape {found}; for this model and batch "
                f"it must have {config.num_hidden_layers} of shape {c_shape}"
            )
        for layer, state in self.rnn_state.items():
            for name, t, shape in zip("cnm", state, (c_shape, c_shape[:3], c_shape[:2]), strict=True):
                # The reference kernels take float64.
                dtypes = (self.dtype,) if name == "c" else (torch.float32, torch.float64)
                if tuple(t.shape) != shape or t.dtype not in dtypes:
                    raise ValueError(
                        f"cache_params has {name} of shape {tuple(t.shape)} and dtype {t.dtype} in layer {layer}; it "
                        f"must have shape {shape} and dtype {dtypes[0]}"
                    )

    def layer_states(self) -> list[State]:
        """The states of all layers. They may be written in place where gradients are off."""
        for layer, state in self.rnn_state.items():
            if any(map(_frozen, state)):
                self.rnn_state[layer] = _map(lambda t: t.detach().clone(), state)
        return [self.rnn_state[layer] for layer in range(len(self.rnn_state))]

    def update(self, states: Iterable[State], num_tokens: int) -> None:
        """Sets the states of all layers after `num_tokens` more tokens."""
        for layer, new in enumerate(states):
            old = self.rnn_state[layer]
            if torch.is_grad_enabled() or old[0].device != new[0].device:
                self.rnn_state[layer] = (new[0].to(self.dtype), new[1], new[2])
            else:
                for target, source in zip(old, new, strict=True):
                    if target is not source:
                        target.copy_(source)
        self._seq_length += num_tokens
        self.unread = None

    def reset(self, rows: Tensor | Sequence[int] | None = None) -> None:
        """Returns to the state before the first token: all rows, or some, as where a sequence of a batch has ended.

        Args:
            rows: numbers of rows of the states, or (batch,) bool, True at those rows. The other rows stay as they are,
                and so does the number of tokens seen, which all rows share: position_ids go on counting. Without
                gradients the rows are written in place.

        Raises:
            TypeError, ValueError: `rows` is not as above. Nothing has changed.
        """
        if rows is None:
            self._apply(torch.zeros_like)
            self._seq_length = 0
            self.unread = None
            return
        rows = checked_rows(rows, self.rnn_state[0][0])
        self._apply(lambda t: fresh_rows(t, rows, inplace=not (torch.is_grad_enabled() or _frozen(t))))

    def detach(self) -> xLSTMCache:
        """Cuts the states from their history, for truncated backpropagation through time: the gradients of what is read
        next end here. Returns this cache, whose tensors keep their memory."""
        self._apply(torch.Tensor.detach)
        return self

    def clone(self) -> xLSTMCache:
        """A copy that shares no memory with this cache."""
        return self._mapped(torch.clone)

    def copy_(self, other: xLSTMCache) -> xLSTMCache:
        """Copies the states of `other`, of the same shapes, into this cache's own tensors."""
        for mine, theirs in zip(self.rnn_state.values(), other.rnn_state.values(), strict=True):
            for target, source in zip(mine, theirs, strict=True):
                target.copy_(source)
        self._seq_length, self.unread = other._seq_length, other.unread
        return self

    def expand(self, copies: int) -> xLSTMCache:
        """A new cache with `copies` adjacent copies of every row, for sequences that share a prompt. This cache is
        unchanged.

        Raises:
            TypeError, ValueError: `copies` is no whole number, or less than 1.
        """
        check_count("copies", copies, 1)
        return self._mapped(lambda t: t.repeat_interleave(copies, dim=0))

    def save(self, path: str | os.PathLike) -> None:
        """Writes the cache to a safetensors file atomically.

        Raises:
            OSError: the file cannot be written. An older file is kept.
        """
        tensors = {
            f"{layer}.{name}": t.detach().cpu().contiguous()
            for layer, state in self.rnn_state.items()
            for name, t in zip("cnm", state, strict=True)
        }
        if self.unread is not None:
            tensors["unread"] = self.unread.cpu()
        facts = {"format": _FORMAT, "seq_length": self._seq_length, "layers": len(self.rnn_state)}
        path = Path(path)
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        os.close(handle)
        try:
            save_file(tensors, temporary, {name: json.dumps(value) for name, value in facts.items()})
            os.replace(temporary, path)
        except BaseException:
            os.unlink(temporary)
            raise

    @classmethod
    def load(
        cls,
        path: str | os.PathLike,
        config: xLSTMConfig | None = None,
        device: torch.device | str = "cpu",
    ) -> xLSTMCache:
        """Reads a file that :meth:`save` wrote.

        Args:
            path: the file.
            config: of a model that the cache must fit, or None.
            device: of the states.

        Raises:
            OSError: the file cannot be read, or is a folder.
            ValueError: the file holds no cache, or one of another model; or the device does not exist.
        """
        if os.path.isdir(path):
            raise IsADirectoryError(f"path is {os.fspath(path)!r}, a folder; it must be a file")
        try:
            torch.empty(0, device=device)
        except (RuntimeError, AssertionError) as error:  # AssertionError: torch was built without CUDA
            raise ValueError(f"device is {str(device)!r}, which torch cannot use: {error}") from error
        try:
            with safe_open(os.fspath(path), framework="pt", device=str(device)) as file:
                facts = {name: json.loads(value) for name, value in (file.metadata() or {}).items()}
                if facts.get("format") != _FORMAT:
                    raise ValueError(f"{path} holds no xLSTM cache that this version reads")
                for name, least in (("layers", 1), ("seq_length", 0)):
                    if type(facts.get(name)) is not int or facts[name] < least:
                        raise ValueError(f"{path} holds no xLSTM cache: {name} is {facts.get(name)!r}")
                # Shapes and dtypes are checked on the meta device, before anything is read.
                meta = {name: _on_meta(file.get_slice(name)) for name in file.keys()}
                what = "the cache of another model" if config is not None else "no xLSTM cache"
                try:
                    skeleton = _assembled(meta, facts)
                    skeleton.check(_Shape.of(skeleton) if config is None else config, skeleton.batch_size)
                except ValueError as error:
                    raise ValueError(f"{path} holds {what}: {error}") from error
                return _assembled({name: file.get_tensor(name) for name in meta}, facts)
        except (SafetensorError, json.JSONDecodeError, KeyError, RecursionError) as error:
            raise ValueError(f"{path} holds no xLSTM cache: {error}") from error
        except RuntimeError as error:  # of mmap
            raise OSError(f"{path} cannot be read: {error}") from error

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Row b becomes a copy of row ``beam_idx[b]``, as beam search needs; beam_idx (batch,) integers."""
        self._select("beam_idx", beam_idx)

    def batch_select_indices(self, indices: Tensor | Sequence[int]) -> None:
        """Keeps the rows `indices`, in their order; or those where `indices`, (batch,) bool, is True.

        Raises:
            TypeError, ValueError: `indices` is not as above. Nothing has changed.
        """
        self._select("indices", indices)

    def _select(self, name: str, indices: Tensor | Sequence[int]) -> None:
        rows = checked_rows(indices, self.rnn_state[0][0], name)
        if rows.dtype == torch.bool:
            rows = rows.nonzero().squeeze(1)
        self._apply(lambda t: t.index_select(0, rows.to(t.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Replaces every row by `repeats` adjacent copies, at least 1."""
        check_count("repeats", repeats, 1)
        self._apply(lambda t: t.repeat_interleave(repeats, dim=0))

    def to(self, device: torch.device | str) -> xLSTMCache:
        """Moves the states to a device."""
        self._apply(lambda t: t.to(device))
        return self

    def _apply(self, function: Any) -> None:
        self.rnn_state = {layer: _map(function, state) for layer, state in self.rnn_state.items()}
        if self.unread is not None:
            self.unread = function(self.unread)

    def _mapped(self, function: Any) -> xLSTMCache:
        cache = xLSTMCache.from_states(self.rnn_state.values(), self.dtype, self._seq_length)
        cache.unread = self.unread
        cache._apply(function)
        return cache

    def __repr__(self) -> str:
        c = self.rnn_state[0][0]
        return (
            f"xLSTMCache(layers={len(self.rnn_state)}, c={tuple(c.shape)}, dtype={self.dtype}, "
            f"device={c.device}, seq_length={self._seq_length})"
        )


@dataclasses.dataclass
class _Shape:
    """The sizes of a cache, under a configuration's names."""

    num_hidden_layers: int
    num_heads: int
    qk_head_dim: int
    v_head_dim: int

    @classmethod
    def of(cls, cache: xLSTMCache) -> _Shape:
        c = cache.rnn_state[0][0]
        if c.dim() != 4:
            raise ValueError(f"c has {c.dim()} dimensions; it must have 4")
        return cls(len(cache.rnn_state), *c.shape[1:])


def _on_meta(part: Any) -> Tensor:
    """A tensor without data, of a tensor's shape and dtype in a safetensors file."""
    return torch.empty(part.get_shape(), dtype=_DTYPES.get(part.get_dtype(), torch.int64), device="meta")


def _assembled(tensors: dict[str, Tensor], facts: dict[str, Any]) -> xLSTMCache:
    """The cache of a file.

    Raises:
        KeyError: a state is missing.
        ValueError: a tensor is none of a cache's.
    """
    states = [(tensors[f"{n}.c"], tensors[f"{n}.n"], tensors[f"{n}.m"]) for n in range(facts["layers"])]
    c, unread = states[0][0], tensors.get("unread")
    if len(tensors) != 3 * len(states) + (unread is not None):
        raise ValueError("the file holds tensors beside the states of its layers")
    if c.dtype not in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        raise ValueError("c must be floating-point")
    if unread is not None and (unread.dtype != torch.int64 or unread.shape != c.shape[:1]):
        raise ValueError("unread must be a whole number for each row")
    cache = xLSTMCache.from_states(states, c.dtype, facts["seq_length"])
    cache.unread = unread
    return cache


def check_count(name: str, value: int, least: int) -> None:
    """Refuses what is no whole number, or is less than `least`."""
    if isinstance(value, torch.SymInt):
        return
    if not isinstance(value, numbers.Integral) or isinstance(value, bool):
        raise TypeError(f"{name} is {value!r:.80}; it must be a whole number")
    if value < least:
        raise ValueError(f"{name} is {value}; it must be at least {least}")


def one_cache(**named: Any) -> xLSTMCache | None:
    """The cache that a caller passed under one of several names; an unused name is None.

    Raises:
        TypeError: it is not an `xLSTMCache` of this package, but a key-value cache or transformers' own xLSTMCache, for
            example.
        ValueError: two different caches.
    """
    given = {name: cache for name, cache in named.items() if cache is not None}
    for name, cache in given.items():
        if not isinstance(cache, xLSTMCache):
            found = f"{type(cache).__module__}.{type(cache).__qualname__}"
            raise TypeError(f"{name} is a {found}; it must be a flash_xlstm.models.xLSTMCache or None")
    if len({id(cache) for cache in given.values()}) > 1:
        raise ValueError(f"{' and '.join(given)} are names of one argument; give one of them")
    return next(iter(given.values()), None)


def _map(function: Any, state: State) -> State:
    c, n, m = state
    return function(c), function(n), function(m)


def _frozen(t: Tensor) -> bool:
    """Whether writing into `t` would break autograd or torch.inference_mode's rules."""
    if torch.is_grad_enabled() or torch.compiler.is_compiling():
        return False
    return t.requires_grad or (t.is_inference() and not torch.is_inference_mode_enabled())


def _flatten(cache: xLSTMCache) -> tuple[list[Any], list[Any]]:
    """The states, then the rest. The length is a leaf, so that an exported program can have it dynamic."""
    extra = [name for name in ("slots", "unread") if getattr(cache, name) is not None]
    leaves = [t for state in cache.rnn_state.values() for t in state]
    leaves += [cache._seq_length, *(getattr(cache, name) for name in extra)]
    return leaves, [len(cache.rnn_state), str(cache.dtype).removeprefix("torch."), extra]


def _flatten_with_keys(cache: xLSTMCache) -> tuple[list[tuple[Any, Any]], list[Any]]:
    leaves, context = _flatten(cache)
    layers, _, extra = context
    names = [f"{layer}.{name}" for layer in range(layers) for name in "cnm"] + ["seq_length", *extra]
    return [(pytree.MappingKey(name), leaf) for name, leaf in zip(names, leaves, strict=True)], context


def _unflatten(leaves: Iterable[Any], context: list[Any]) -> xLSTMCache:
    layers, dtype, extra = context
    leaves = list(leaves)  # of any type: torch also maps specifications over trees
    cache = xLSTMCache.__new__(xLSTMCache)
    cache.dtype = getattr(torch, dtype)
    cache.rnn_state = {layer: tuple(leaves[3 * layer : 3 * layer + 3]) for layer in range(layers)}
    cache._seq_length, *rest = leaves[3 * layers :]
    for name, leaf in zip(extra, rest, strict=True):
        setattr(cache, name, leaf)
    return cache


# Exported programs have caches among their inputs and outputs.
pytree.register_pytree_node(
    xLSTMCache,
    _flatten,
    _unflatten,
    serialized_type_name="flash_xlstm.models.xLSTMCache",
    flatten_with_keys_fn=_flatten_with_keys,
)
torch.serialization.add_safe_globals([xLSTMCache])  # saved programs hold their example inputs
