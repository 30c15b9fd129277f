"""Names and signatures of the package ``flashrnn``, for its function ``slstm``.

Code written for that package changes one import::

    from flash_xlstm.integrations.flashrnn import flashrnn, FlashRNNConfig

Differences:

- The functions ``lstm``, ``gru`` and ``elman`` are refused. ``function`` is ``lstm`` by default there, and so here.
- Every backend's name is accepted, and takes this package's op on CPU and CUDA.
- The first result is a :class:`States` instead of a tensor. ``states[0]``, the output, costs nothing more. The other
  three are computed when they are asked for.
- A given state has n = 0, a fresh unit, or n >= 1, as every state has that either package returns. (The other package
  lifts n to 1 in its first step.)
- ``batch_size``, and the dtypes of a configuration other than ``dtype`` and ``dtype_w``, change nothing.
- The numbers of gates and states must be 4, and sizes must agree. (The other package overwrites the numbers.)
"""

from __future__ import annotations

import numbers
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from flash_xlstm.integrations import _cells
from flash_xlstm.nn.block_stack.slstm import _NOTHING
from flash_xlstm.ops import _errors

__all__ = ["FlashRNNConfig", "States", "flashrnn"]

_BACKENDS = ("vanilla", "vanilla_fwbw", "cuda", "cuda_fused", "triton_fused")
_FUNCTIONS = ("slstm", "lstm", "gru", "elman")
_DTYPES = ("float32", "bfloat16", "float16")
_SHAPES = {
    "input_shape": ("BTGHD", "TBGHD"),
    "output_shape": ("SBHTD", "STBHD", "SBTHD"),
    "recurrent_shape": ("GHDP", "HGDP", "HPGD", "HPDG"),
    "bias_shape": ("GHD", "HGD", "HDG"),
}
_STATES = 4  # h, c, n, m
_GATES = 4  # i, f, z, o
_FOURS = ("num_gates_r", "num_gates_w", "num_gates_i", "num_gates_t", "num_states")
_SIZES = ("hidden_dim", "num_heads", "head_dim")
_DTYPE_FIELDS = ("dtype", "dtype_acc", "dtype_b", "dtype_r", "dtype_w", "dtype_g", "dtype_s", "dtype_a")
_LETTERS = {
    "B": "batch", "T": "time", "G": "number of gates (i, f, z, o)", "H": "number of heads", "D": "number of units",
    "P": "number of units at the previous time", "S": "number of states (h, c, n, m)",
}  # fmt: skip


@dataclass
class FlashRNNConfig:
    """Settings of :func:`flashrnn`.

    Letters of a shape: B batch, T time, G gates (i, f, z, o), H heads, D units of a head, P units of a head at the
    previous time, S states (h, c, n, m).

    Attributes:
        backend: a name; every one takes the same op.
        function: must be ``slstm``.
        gradient_recurrent_cut: no gradient reaches h_{t-1} through R.
        gradient_recurrent_clipval: bound of the elements of that gradient, greater than 0, or None.
        forward_clipval: must be None.
        constants: must be empty or None.
        initial_val: must be 0.
        hidden_dim, num_heads, head_dim: two of them give the third; they are checked against the tensors.
        num_states, num_gates_r, num_gates_w, num_gates_i, num_gates_t: must be 4.
        input_shape, output_shape, recurrent_shape, bias_shape: of Wx, of the states, of R and b.
        dtype: the default of the other dtypes.
        dtype_w: the dtype of Wx in the kernel, for backends other than ``vanilla``, with
            `enable_automatic_mixed_precision`.

    Raises:
        ValueError, TypeError: a value that is unknown or not supported.
    """

    backend: Literal["vanilla", "vanilla_fwbw", "cuda", "cuda_fused", "triton_fused"] = "cuda_fused"
    function: str = "lstm"
    gradient_recurrent_cut: bool = False
    gradient_recurrent_clipval: float | None = None
    forward_clipval: float | None = None
    constants: dict[str, float] | None = None
    simple_agg: bool = True

    hidden_dim: int = -1
    num_heads: int = -1
    head_dim: int = -1
    num_states: int = 4

    num_gates_r: int = 4
    num_gates_w: int = 4
    num_gates_i: int = 4
    num_gates_t: int = 4

    batch_size: int = 8

    input_shape: Literal["BTGHD", "TBGHD"] = "BTGHD"
    output_shape: Literal["SBHTD", "STBHD", "SBTHD"] = "SBTHD"
    recurrent_shape: Literal["GHDP", "HGDP", "HPGD", "HPDG"] = "GHDP"
    bias_shape: Literal["GHD", "HGD", "HDG"] = "GHD"

    dtype: str = "bfloat16"
    dtype_acc: str | None = "float32"
    dtype_b: str | None = None
    dtype_r: str | None = None
    dtype_w: str | None = None
    dtype_g: str | None = None
    dtype_s: str | None = None
    dtype_a: str | None = None
    enable_automatic_mixed_precision: bool = True
    trainable_r: list[bool] | bool = True
    trainable_b: list[bool] | bool = True
    initial_val: float | Sequence[float] = 0.0

    def __post_init__(self) -> None:
        for name in (*_SIZES, *_FOURS):
            value = getattr(self, name)
            if not isinstance(value, numbers.Integral) or isinstance(value, bool):
                raise TypeError(f"{name} is {value!r}; it must be a whole number")
        self._fill_in_sizes()
        self.dtype_b = self.dtype_b or self.dtype
        self.dtype_a = self.dtype_a or self.dtype_b
        self.dtype_r = self.dtype_r or self.dtype
        self.dtype_w = self.dtype_w or self.dtype
        self.dtype_s = self.dtype_s or self.dtype_w
        self.dtype_g = self.dtype_g or self.dtype_r
        _check_config(self)
        self.constants = {}

    def _fill_in_sizes(self) -> None:
        if self.num_heads <= 0 and self.head_dim <= 0:
            self.num_heads = 1
        if self.num_heads <= 0:
            self.num_heads = self.hidden_dim // self.head_dim
        elif self.head_dim <= 0:
            self.head_dim = self.hidden_dim // self.num_heads
        if self.hidden_dim <= 0:
            self.hidden_dim = self.num_heads * self.head_dim
        if self.num_gates_t < 0:
            self.num_gates_t = self.num_gates_r

    @property
    def input_dim(self) -> int:
        return self.num_gates_w * self.hidden_dim

    @property
    def torch_dtype(self) -> torch.dtype:
        return getattr(torch, self.dtype)

    @property
    def torch_dtype_b(self) -> torch.dtype:
        return getattr(torch, self.dtype_b or self.dtype)

    @property
    def torch_dtype_r(self) -> torch.dtype:
        return getattr(torch, self.dtype_r or self.dtype)

    @property
    def torch_dtype_w(self) -> torch.dtype:
        return getattr(torch, self.dtype_w or self.dtype)

    @property
    def torch_dtype_s(self) -> torch.dtype:
        return getattr(torch, self.dtype_s or self.dtype)


class States(Sequence[Tensor]):
    """The states h, c, n, m after every token: a sequence of four tensors.

    ``states[0]`` is h, as the kernel returns it. c, n and m are computed from it when one of them is first read, in
    float64, with gradients. A tuple as index goes on into the tensor: ``states[0, :, -1]``.
    """

    def __init__(self, h: Tensor, others: Any) -> None:
        self._h = h
        self._others = others
        self._all: Tensor | None = None

    @property
    def shape(self) -> torch.Size:
        """That of :meth:`stack`'s result."""
        return torch.Size((_STATES, *self._h.shape))

    @property
    def dtype(self) -> torch.dtype:
        return self._h.dtype

    @property
    def device(self) -> torch.device:
        return self._h.device

    def stack(self) -> Tensor:
        """All states in one tensor of `shape`."""
        if self._all is None:
            self._all = torch.stack([self._h, *self._others()])
        return self._all

    def __len__(self) -> int:
        return _STATES

    def __getitem__(self, index: Any) -> Tensor:
        first, rest = (index[0], index[1:]) if isinstance(index, tuple) and index else (index, ())
        if isinstance(first, int) and not isinstance(first, bool) and first in (0, -_STATES):
            return self._h[rest] if rest else self._h
        return self.stack()[index]

    def __iter__(self) -> Iterator[Tensor]:
        return iter([self._h, *self.stack()[1:]])


def flashrnn(
    Wx: Tensor,
    R: Tensor,
    b: Tensor,
    states: Tensor | None = None,
    function: str = "lstm",
    config: FlashRNNConfig | None = None,
    backend: str = "cuda_fused",
    dtype: str = "bfloat16",
) -> tuple[States, Tensor]:
    """The sLSTM over a sequence, :func:`flash_xlstm.ops.slstm`.

    Args:
        Wx: (batch, seq, 4, heads, dim) pre-activations, or `config.input_shape`. Gates in the order i, f, z, o.
        R: (4, heads, out, in) recurrent weights, or `config.recurrent_shape`.
        b: (4, heads, dim) bias, or `config.bias_shape`.
        states: (4, batch, 1, heads, dim), or `config.output_shape`: h, c, n, m before the first token. Default: zeros.
        function: must be ``slstm``, unless there is a `config`, which then says so.
        config: settings; None takes them from the tensors.
        backend, dtype: names; they change nothing without a `config`.

    Returns:
        The states after every token, (4, batch, seq, heads, dim), and those after the last, (4, batch, 1, heads, dim);
        or `config.output_shape`. In the dtype of Wx, or of `config.dtype_w`.

    Raises:
        ValueError, TypeError: another function, an unknown name, or an argument of a wrong shape or dtype.
    """
    try:
        return _flashrnn(Wx, R, b, states, function, config, backend, dtype)
    except Exception as error:
        if torch.compiler.is_compiling():
            raise
        raise _errors.explain(error, flashrnn, locals()) from None


def _flashrnn(
    Wx: Tensor, R: Tensor, b: Tensor, states: Tensor | None, function: str, config: Any, backend: str, dtype: str
) -> tuple[States, Tensor]:
    if config is None:
        _check_function(function)
        _check_backend(backend)
        _check_dtype("dtype", dtype)
        kernel_dtype, shapes = Wx.dtype, ("BTGHD", "GHDP", "GHD", "SBTHD")
        clip = None
    else:
        _check_config(config)
        kernel_dtype = kernel_dtype_of(config, Wx.dtype)
        shapes = config.input_shape, config.recurrent_shape, config.bias_shape, config.output_shape
        clip = _NOTHING if config.gradient_recurrent_cut else config.gradient_recurrent_clipval
    x = _permuted("Wx", Wx, shapes[0], "BTGHD", G=_GATES).to(kernel_dtype)
    batch, _, _, heads, dim = x.shape
    if config is not None and (heads, dim) != (config.num_heads, config.head_dim):
        raise ValueError(
            f"Wx has {heads} heads of {dim} units; by config they must be {config.num_heads} of {config.head_dim}"
        )
    R = _permuted("R", R, shapes[1], "GHDP", G=_GATES, H=heads, D=dim, P=dim)
    b = _permuted("b", b, shapes[2], "GHD", G=_GATES, H=heads, D=dim)
    output_shape = shapes[3]
    state = None
    if states is not None:
        state = _permuted("states", states, output_shape, "SBTHD", S=_STATES, B=batch, T=1, H=heads, D=dim).squeeze(2)
    try:
        h, last = _cells.slstm(x, R, b, state, clip=clip)
    except (TypeError, ValueError) as error:  # in the op's names
        if torch.compiler.is_compiling():
            raise
        text = re.sub(r"\b(initial_)?state [hcnm]\b", "states", str(error))
        raise type(error)(re.sub(r"\bx\b", "Wx", text)) from None
    layout = output_shape.replace("S", "")
    every = States(
        _permuted("h", h, "BTHD", layout),
        lambda: [_permuted("h", t.to(h.dtype), "BTHD", layout) for t in other_states(x, R, b, state, h)],
    )
    return every, _permuted("states", last.to(h.dtype).unsqueeze(2), "SBTHD", output_shape)


def other_states(x: Tensor, R: Tensor, b: Tensor, state: Tensor | None, h: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """c, n and m after every token, each (batch, seq, heads, dim) float64, from the outputs h.

    With h known there is no recurrence but sums: with ``F_t = sum_{u<=t} logsigmoid(f_u)``, m and n are a running
    maximum and a running logarithm of a sum of ``i_u - F_u``, and ``c = h n / sigmoid(o)``. The differences of F_t
    cancel, hence float64.
    """
    x, R, b, h = (t.double() for t in (x, R, b, h))
    batch, _, heads, dim = h.shape
    h0, _, n0, m0 = h.new_zeros((_STATES, batch, heads, dim)) if state is None else state.double()
    before = torch.cat([h0.unsqueeze(1), h[:, :-1]], dim=1)
    i, f, _, o = (x + torch.einsum("bthp,ghdp->btghd", before, R) + b).unbind(2)
    total = F.logsigmoid(f).cumsum(1)
    fresh = n0 == 0
    m0 = torch.where(fresh, -torch.inf, m0).unsqueeze(1)
    log_n0 = torch.where(fresh, 1.0, n0).log().unsqueeze(1)  # with a fresh unit's m0 it counts for nothing
    m = total + torch.cat([m0, i - total], dim=1).cummax(1).values[:, 1:]
    n = (total - m + torch.cat([m0 + log_n0, i - total], dim=1).logcumsumexp(1)[:, 1:]).exp()
    return h * n / torch.sigmoid(o), n, m


def kernel_dtype_of(config: Any, dtype: torch.dtype) -> torch.dtype:
    """The dtype in which a kernel of `config` reads Wx, whose dtype is `dtype`."""
    if config.backend == "vanilla" or not config.enable_automatic_mixed_precision:
        return dtype
    return getattr(torch, getattr(config, "dtype_w", None) or config.dtype)


def _permuted(name: str, t: Tensor, shape: str, wanted: str, **sizes: int) -> Tensor:
    """`t` in the layout `wanted` instead of `shape`. `sizes` are those that it must have, by letter."""
    found = t.shape
    if len(found) != len(shape):
        raise ValueError(f"{name} has shape {tuple(found)}; it must have {len(shape)} dimensions, {shape}")
    for letter, size in sizes.items():
        if found[shape.index(letter)] != size:
            raise ValueError(f"{name} has shape {tuple(found)}; its {_LETTERS[letter]}, in {shape}, must be {size}")
    return t if shape == wanted else t.permute([shape.index(letter) for letter in wanted])


def _check_config(config: Any) -> None:
    """Checks the settings of :class:`FlashRNNConfig`, or of another library's class with these fields.

    Raises:
        ValueError, TypeError: a value that is unknown or not supported, or a field is missing.
    """
    try:
        _check_fields(config)
    except AttributeError as error:
        raise TypeError(
            f"config is of type {type(config).__name__}, without {error.name}; it must be a FlashRNNConfig or None"
        ) from None


def _check_fields(config: Any) -> None:
    _check_function(config.function)
    _check_backend(config.backend)
    for name, allowed in _SHAPES.items():
        if getattr(config, name) not in allowed:
            raise ValueError(f"{name} is {getattr(config, name)!r}; it must be one of {', '.join(allowed)}")
    clip = config.gradient_recurrent_clipval
    if clip is not None:
        if not isinstance(clip, numbers.Real) or isinstance(clip, bool):
            raise TypeError(f"gradient_recurrent_clipval is {clip!r}; it must be a number or None")
        if not float(clip) > 2.0**-150:  # rounds to 0 in float32
            raise ValueError(f"gradient_recurrent_clipval is {clip}; it must be None, or greater than 0 in float32")
    if config.forward_clipval is not None:
        raise ValueError(f"forward_clipval is {config.forward_clipval}; it must be None: the output is not clipped")
    if config.constants:
        raise ValueError(f"constants is {config.constants}; it must be empty: the sLSTM has none")
    initial: Any = config.initial_val
    if any(value != 0 for value in ([initial] if initial is None or isinstance(initial, numbers.Real) else initial)):
        raise ValueError(f"initial_val is {initial}; it must be 0. Give `states` instead")
    for name in _FOURS:
        if getattr(config, name) != 4:
            raise ValueError(f"{name} is {getattr(config, name)}; it must be 4, as the sLSTM has")
    hidden, heads, dim = (getattr(config, name) for name in _SIZES)
    if hidden != heads * dim:
        raise ValueError(f"hidden_dim is {hidden}; it must be num_heads * head_dim, and they are {heads} and {dim}")
    for name in _DTYPE_FIELDS:
        _check_dtype(name, getattr(config, name) or "float32")


def _check_function(function: str) -> None:
    if function not in _FUNCTIONS:
        raise ValueError(f"function is {function!r}; it must be 'slstm'")
    if function != "slstm":
        raise ValueError(
            f"function is {function!r}; this package computes 'slstm' only. Take flashrnn for {function!r}"
        )


def _check_dtype(name: str, dtype: str) -> None:
    if dtype not in _DTYPES:
        raise ValueError(f"{name} is {dtype!r}; it must be one of {', '.join(_DTYPES)}")


def _check_backend(backend: str) -> None:
    if backend not in _BACKENDS:
        raise ValueError(f"backend is {backend!r}; it must be one of {', '.join(_BACKENDS)}")
