"""The recurrent states of an xLSTM model between forward passes."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from flash_xlstm.models.configuration_xlstm import xLSTMConfig

State = tuple[Tensor, Tensor, Tensor]

_FORMAT = "flash_xlstm cache 1"


class xLSTMCache:
    """What an xLSTM remembers of the tokens it has seen; its size does not depend on their number.

    A forward pass that is given a cache continues from it and advances it. Without gradients the tensors are
    written in place, so their addresses stay; with gradients they are replaced, and what autograd saved stays
    intact.

    Args:
        config: the model's configuration.
        max_batch_size: the batch size.
        dtype: of the matrix memory; default ``config.inference_state_dtype``. The rest is float32.
        device: default: torch's.

    Attributes:
        rnn_state: for each layer ``(c, n, m)``: matrix memory c (batch, heads, qk_head_dim, v_head_dim),
            normalizer n (batch, heads, qk_head_dim), stabilizer m (batch, heads).
        slots: None, or (batch,) int32: the row of the states that each row of a single token uses; -1 leaves a row out.

    Example::

        cache = xLSTMCache(model.config, max_batch_size=1, device=model.device)
        out = model(input_ids, cache_params=cache)
        out = model(next_ids, cache_params=cache)  # continues
    """

    is_compileable = False  # read by GenerationMixin
    slots: Tensor | None = None

    def __init__(
        self,
        config: xLSTMConfig,
        max_batch_size: int,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        **kwargs: Any,
    ) -> None:
        self.dtype = getattr(torch, config.inference_state_dtype) if dtype is None else dtype
        c_shape = (max_batch_size, config.num_heads, config.qk_head_dim, config.v_head_dim)
        self.rnn_state: dict[int, State] = {
            layer: (
                torch.zeros(c_shape, dtype=self.dtype, device=device),
                torch.zeros(c_shape[:3], dtype=torch.float32, device=device),
                torch.zeros(c_shape[:2], dtype=torch.float32, device=device),
            )
            for layer in range(config.num_hidden_layers)
        }
        self._seq_length = 0

    @classmethod
    def from_states(cls, states: Iterable[State], dtype: torch.dtype, seq_length: int) -> xLSTMCache:
        """A cache that takes over the states of all layers, after `seq_length` tokens."""
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
    def seqlen_offset(self) -> int:
        """The number of tokens seen, padding included."""
        return self._seq_length

    @property
    def is_linear(self) -> list[bool]:
        """For each layer, that its state does not grow with the sequence; read by GenerationMixin."""
        return [True] * len(self.rnn_state)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """The number of tokens seen, padding included; the same for every layer."""
        return self._seq_length

    def set_seq_length(self, length: int) -> None:
        """Sets the number of tokens seen."""
        self._seq_length = length

    def check(self, config: xLSTMConfig, batch_size: int) -> None:
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
                # float64 is for the reference kernels.
                dtypes = (self.dtype,) if name == "c" else (torch.float32, torch.float64)
                if tuple(t.shape) != shape or t.dtype not in dtypes:
                    raise ValueError(
                        f"cache_params has {name} of shape {tuple(t.shape)} and dtype {t.dtype} in layer {layer}; it "
                        f"must have shape {shape} and dtype {dtypes[0]}"
                    )

    def layer_states(self, devices: Iterable[torch.device]) -> list[State]:
        """The states of all layers, on its layer's device; safe to write in place where gradients are off."""
        for layer, device in enumerate(devices):
            state = self.rnn_state[layer]
            if state[0].device != device:
                self.rnn_state[layer] = state = _map(lambda t, d=device: t.to(d), state)
            if any(map(_frozen, state)):
                self.rnn_state[layer] = _map(lambda t: t.detach().clone(), state)
        return [self.rnn_state[layer] for layer in range(len(self.rnn_state))]

    def update(self, states: Iterable[State], num_tokens: int) -> None:
        """Takes the states of all layers after `num_tokens` more tokens."""
        for layer, new in enumerate(states):
            old = self.rnn_state[layer]
            if torch.is_grad_enabled():
                self.rnn_state[layer] = (new[0].to(self.dtype), new[1], new[2])
            else:
                for target, source in zip(old, new, strict=True):
                    if target is not source:
                        target.copy_(source)
        self._seq_length += num_tokens

    def reset(self) -> None:
        """Forgets everything."""
        self._apply(torch.zeros_like)
        self._seq_length = 0

    def clone(self) -> xLSTMCache:
        """A copy that shares no memory with this cache."""
        states = (_map(torch.clone, state) for state in self.rnn_state.values())
        return xLSTMCache.from_states(states, self.dtype, self._seq_length)

    def copy_(self, other: xLSTMCache) -> xLSTMCache:
        """Takes the states of `other`, of the same shapes, into this cache's own tensors."""
        for mine, theirs in zip(self.rnn_state.values(), other.rnn_state.values(), strict=True):
            for target, source in zip(mine, theirs, strict=True):
                target.copy_(source)
        self._seq_length = other._seq_length
        return self

    def expand(self, copies: int) -> xLSTMCache:
        """A new cache with `copies` copies of every row, next to each other: one prompt as the common beginning of many
        sequences. This cache stays as it is."""
        states = (_map(lambda t: t.repeat_interleave(copies, dim=0), state) for state in self.rnn_state.values())
        return xLSTMCache.from_states(states, self.dtype, self._seq_length)

    def save(self, path: str | os.PathLike) -> None:
        """Writes the cache to a safetensors file, whole or not at all.

        Raises:
            OSError: the file cannot be written; what was there before is still there.
        """
        tensors = {
            f"{layer}.{name}": t.detach().cpu().contiguous()
            for layer, state in self.rnn_state.items()
            for name, t in zip("cnm", state, strict=True)
        }
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
        """Reads what :meth:`save` wrote.

        Args:
            path: the file.
            config: if given, the cache must fit this model.
            device: where the states go.

        Raises:
            OSError: the file cannot be read.
            ValueError: it holds no cache, or that of another model; or there is no such device.
        """
        try:
            torch.empty(0, device=device)
        except (RuntimeError, AssertionError) as error:  # the latter where torch was built without CUDA
            raise ValueError(f"device is {str(device)!r}, which torch cannot use: {error}") from error
        try:
            with safe_open(os.fspath(path), framework="pt", device=str(device)) as file:
                facts = {name: json.loads(value) for name, value in (file.metadata() or {}).items()}
                if facts.get("format") != _FORMAT:
                    raise ValueError(f"{path} holds no xLSTM cache that this version reads")
                states = [
                    (file.get_tensor(f"{layer}.c"), file.get_tensor(f"{layer}.n"), file.get_tensor(f"{layer}.m"))
                    for layer in range(facts["layers"])
                ]
        except (SafetensorError, json.JSONDecodeError, KeyError) as error:
            raise ValueError(f"{path} holds no xLSTM cache: {error}") from error
        cache = cls.from_states(states, states[0][0].dtype, facts["seq_length"])
        if config is not None:
            try:
                cache.check(config, cache.batch_size)
            except ValueError as error:
                raise ValueError(f"{path} holds the cache of another model: {error}") from error
        return cache

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Row b becomes a copy of row ``beam_idx[b]``, as beam search needs; beam_idx (batch,) integers."""
        self.batch_select_indices(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keeps the rows `indices`, in their order."""
        self._apply(lambda t: t.index_select(0, indices.to(t.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Makes `repeats` copies of every row, next to each other."""
        self._apply(lambda t: t.repeat_interleave(repeats, dim=0))

    def to(self, device: torch.device | str) -> xLSTMCache:
        """Moves the states to a device."""
        self._apply(lambda t: t.to(device))
        return self

    def _apply(self, function: Any) -> None:
        self.rnn_state = {layer: _map(function, state) for layer, state in self.rnn_state.items()}

    def __repr__(self) -> str:
        c = self.rnn_state[0][0]
        return (
            f"xLSTMCache(layers={len(self.rnn_state)}, c={tuple(c.shape)}, dtype={self.dtype}, "
            f"device={c.device}, seq_length={self._seq_length})"
        )


def one_cache(**named: xLSTMCache | None) -> xLSTMCache | None:
    """The cache given under any of its names; None counts as not given.

    Raises:
        TypeError: one is no xLSTMCache.
        ValueError: two different ones.
    """
    found = None
    for name, cache in named.items():
        if cache is None:
            continue
        if not isinstance(cache, xLSTMCache):
            raise TypeError(f"{name} is a {type(cache).__name__}; it must be an xLSTMCache")
        if found is not None and cache is not found:
            raise ValueError(f"{', '.join(named)} are names of one argument; give one of them")
        found = cache
    return found


def _map(function: Any, state: State) -> State:
    c, n, m = state
    return function(c), function(n), function(m)


def _frozen(t: Tensor) -> bool:
    """Whether writing into `t` would break autograd or torch.inference_mode's rules."""
    if torch.is_grad_enabled() or torch.compiler.is_compiling():
        return False
    return t.requires_grad or (t.is_inference() and not torch.is_inference_mode_enabled())
