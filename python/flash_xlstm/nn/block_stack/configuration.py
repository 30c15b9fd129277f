"""Configurations of the xLSTM[a:b] of arXiv 2405.04517, with the field names of NX-AI's package ``xlstm``."""

from __future__ import annotations

import copy
import dataclasses
import math
import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar

ACTIVATIONS = ("gelu", "relu", "relu^2", "sigmoid", "swish", "selu")
BIAS_INITS = ("powerlaw_blockdependent", "small_init", "standard", "zeros")

_Config = TypeVar("_Config", bound="Loadable")


class Loadable:
    """A dataclass that converts to and from plain values and YAML text. An unknown key or a value of a wrong type is an
    error that names it."""

    @classmethod
    def from_dict(cls: type[_Config], values: Mapping[str, Any]) -> _Config:
        """The configuration with these values. A nested configuration is a nested mapping. Mappings and sequences may
        be of any type, omegaconf's for example.

        Raises:
            ValueError, TypeError: a key is unknown, or a value is of the wrong type or out of range.
        """
        return _build(cls, values, "")

    @classmethod
    def from_yaml(cls: type[_Config], source: str | Path) -> _Config:
        """The configuration in a YAML text, or in the file at a :class:`~pathlib.Path`. Needs PyYAML.

        Raises:
            ValueError, TypeError: as :meth:`from_dict`, or the text is not YAML.
        """
        try:
            import yaml
        except ImportError as error:
            raise ImportError("from_yaml needs PyYAML. Install it with: pip install pyyaml") from error
        text = source.read_text() if isinstance(source, Path) else source
        try:
            values = yaml.safe_load(text)
        except yaml.YAMLError as error:
            raise ValueError(f"source is not YAML: {error}") from error
        return cls.from_dict(values)

    def to_dict(self) -> dict[str, Any]:
        """Plain values from which :meth:`from_dict` makes an equal configuration. Computed fields are left out."""
        return {
            f.name: value.to_dict() if isinstance(value, Loadable) else copy.deepcopy(value)
            for f in dataclasses.fields(self)  # type: ignore[arg-type]
            if not f.name.startswith("_")
            for value in (getattr(self, f.name),)
        }


def _build(cls: Any, values: Any, where: str) -> Any:
    of = where or cls.__name__
    if not isinstance(values, Mapping):
        raise TypeError(f"{of} is {values!r}; it must be a mapping of field names to values")
    names = {f.name for f in dataclasses.fields(cls)}
    unknown = [str(key) for key in values if key not in names]
    if unknown:
        known = ", ".join(sorted(name for name in names if not name.startswith("_")))
        raise ValueError(f"{of} has no field {', '.join(unknown)}; its fields are {known}")
    hints = typing.get_type_hints(cls)
    # A dump by dataclasses.asdict holds computed fields, which are computed again.
    given = {name: value for name, value in values.items() if not name.startswith("_")}
    return cls(**{name: _convert(value, hints[name], f"{where}.{name}".lstrip(".")) for name, value in given.items()})


def _plain(value: Any) -> Any:
    """`value` with mappings and sequences of any type converted to dicts and lists."""
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, (str, bytes)):
        return [_plain(item) for item in value]
    return value


def _convert(value: Any, hint: Any, where: str) -> Any:
    options = typing.get_args(hint) if typing.get_origin(hint) in (typing.Union, types.UnionType) else (hint,)
    for option in options:
        if dataclasses.is_dataclass(option):
            if isinstance(value, Mapping):
                return _build(option, value, where)
            if isinstance(value, option):  # type: ignore[arg-type]
                return value
        elif _fits(plain := _plain(value), option):
            return float(plain) if option is float else plain
    wanted = " or ".join(_name(option) for option in options)
    raise TypeError(f"{where} is {value!r}; it must be {wanted}")


def _fits(value: Any, hint: Any) -> bool:
    origin = typing.get_origin(hint)
    if origin is Literal:
        return value in typing.get_args(hint)
    if origin is list:
        return isinstance(value, list) and all(_fits(item, typing.get_args(hint)[0]) for item in value)
    if hint in (int, float):  # Python's bool is an int; in YAML it is not
        return isinstance(value, (int, hint)) and not isinstance(value, bool)
    return isinstance(value, hint)


def _name(hint: Any) -> str:
    if typing.get_origin(hint) is Literal:
        return " or ".join(map(repr, typing.get_args(hint)))
    if hint is type(None):
        return "None"
    return "a mapping" if dataclasses.is_dataclass(hint) else getattr(hint, "__name__", str(hint))


def _positive(config: Any, *names: str) -> None:
    for name in names:
        if getattr(config, name) < 1:
            raise ValueError(f"{name} is {getattr(config, name)}; it must be at least 1")


def _one_of(config: Any, name: str, allowed: tuple[Any, ...]) -> None:
    if getattr(config, name) not in allowed:
        raise ValueError(f"{name} is {getattr(config, name)!r}; it must be one of {', '.join(map(repr, allowed))}")


def _probability(config: Any, name: str = "dropout") -> None:
    if not 0.0 <= getattr(config, name) <= 1.0:
        raise ValueError(f"{name} is {getattr(config, name)}; it must be from 0 to 1")


@dataclass
class UpProjection(Loadable):
    """``proj_factor * embedding_dim``, rounded up (down without `round_proj_up_dim_up`) to a multiple of
    `round_proj_up_to_multiple_of`."""

    proj_factor: float = 1.0
    round_proj_up_dim_up: bool = True
    round_proj_up_to_multiple_of: int = 64
    _proj_up_dim: int = field(default=0, repr=False)

    def _set_proj_up_dim(self, embedding_dim: int) -> None:
        _positive(self, "round_proj_up_to_multiple_of")
        if embedding_dim <= 0:
            return  # set by a stack's configuration
        multiples = self.proj_factor * embedding_dim / self.round_proj_up_to_multiple_of
        rounded = math.ceil(multiples) if self.round_proj_up_dim_up else math.floor(multiples)
        self._proj_up_dim = rounded * self.round_proj_up_to_multiple_of
        if self._proj_up_dim < 1:
            raise ValueError(
                f"proj_factor is {self.proj_factor}; at embedding_dim {embedding_dim} and "
                f"round_proj_up_to_multiple_of {self.round_proj_up_to_multiple_of} that is a width of "
                f"{self._proj_up_dim}, and it must be at least 1"
            )


@dataclass
class FeedForwardConfig(UpProjection):
    """The gated feed-forward layer of an sLSTM block (arXiv 2405.04517, figure 9).

    `act_fn` is gelu, relu, relu^2, sigmoid, swish or selu. A stack sets `embedding_dim`.
    """

    proj_factor: float = 1.3
    act_fn: str = "gelu"
    embedding_dim: int = -1
    dropout: float = 0.0
    bias: bool = False
    ff_type: Literal["ffn_gated"] = "ffn_gated"
    _num_blocks: int = field(default=1, repr=False)

    def __post_init__(self) -> None:
        _one_of(self, "act_fn", ACTIVATIONS)
        _one_of(self, "ff_type", ("ffn_gated",))
        _probability(self)
        self._set_proj_up_dim(self.embedding_dim)


@dataclass
class mLSTMLayerConfig(UpProjection):
    """The mLSTM layer between its projections (arXiv 2405.04517, figure 10).

    `qkv_proj_blocksize` is the size of the diagonal blocks of the q, k and v projections; `conv1d_kernel_size` 0 leaves
    the convolution out. A stack sets `embedding_dim`, `bias`, `dropout` and `context_length`, which bounds nothing.
    """

    conv1d_kernel_size: int = 4
    qkv_proj_blocksize: int = 4
    num_heads: int = 4
    proj_factor: float = 2.0
    embedding_dim: int = -1
    bias: bool = False
    dropout: float = 0.0
    context_length: int = -1
    _num_blocks: int | None = field(default=1, repr=False)
    _inner_embedding_dim: int = field(default=0, repr=False)

    def __post_init__(self) -> None:
        _positive(self, "qkv_proj_blocksize", "num_heads")
        _probability(self)
        _kernel_size(self)
        self._set_proj_up_dim(self.embedding_dim)
        inner = self._inner_embedding_dim = self._proj_up_dim
        for name in ("num_heads", "qkv_proj_blocksize"):
            if inner % getattr(self, name):
                raise ValueError(
                    f"{name} is {getattr(self, name)}; it must divide the inner width, which is {inner} at "
                    f"embedding_dim {self.embedding_dim} and proj_factor {self.proj_factor}"
                )


def _kernel_size(config: Any) -> None:
    if config.conv1d_kernel_size < 0:
        raise ValueError(f"conv1d_kernel_size is {config.conv1d_kernel_size}; it must be at least 0")


_Dtype = Literal["bfloat16", "float16", "float32"]
# Fields that NX-AI's kernels are compiled for, and the only value that the kernels here implement.
_FIXED = {
    "function": "slstm",
    "num_states": 4,
    "num_gates": 4,
    "input_shape": "BSGNH",
    "output_shape": "BNSH",
    "forward_clipval": None,
}


@dataclass
class sLSTMLayerConfig(Loadable):
    """The sLSTM layer: convolution, gates, recurrence, group norm (arXiv 2405.04517, figure 9).

    Args:
        embedding_dim: size of input and output. A stack sets it and `dropout`.
        num_heads: heads, each with a recurrent matrix of its own.
        conv1d_kernel_size: size of the convolution; 0 for neither the convolution nor its SiLU.
        group_norm_weight: whether the head-wise norm has a weight.
        bias_init: "powerlaw_blockdependent", "small_init", "standard" or "zeros".
        recurrent_weight_init: "zeros" or "standard".
        gradient_recurrent_cut: whether the gradient to h_{t-1} through the recurrent weights is cut.
        gradient_recurrent_clipval: bound of each element of that gradient; None for no bound.
        backend: "cuda" or "vanilla", NX-AI's two layouts of the recurrent weights
            (:class:`~flash_xlstm.nn.block_stack.sLSTMCell`). Checkpoints have the same layout. It does not choose the
            kernel.

    The other fields let configurations of NX-AI's package load. Fields that would change the results (`function`,
    `forward_clipval`, ...) accept only the implemented value. The dtypes, `batch_size`, `constants` and
    `internal_input_shape` have no effect: kernels compute in the dtype of their inputs, and states are float32.
    """

    embedding_dim: int = -1
    num_heads: int = 4
    conv1d_kernel_size: int = 4
    group_norm_weight: bool = True
    dropout: float = 0.0
    backend: Literal["vanilla", "cuda"] = "cuda"
    bias_init: Literal["powerlaw_blockdependent", "small_init", "standard", "zeros"] = "powerlaw_blockdependent"
    recurrent_weight_init: Literal["zeros", "standard"] = "zeros"
    gradient_recurrent_cut: bool = False
    gradient_recurrent_clipval: float | None = None
    forward_clipval: float | None = None
    function: str = "slstm"
    num_states: int = 4
    num_gates: int = 4
    hidden_size: int = -1
    batch_size: int = 8
    input_shape: str = "BSGNH"
    internal_input_shape: str = "SBNGH"
    output_shape: str = "BNSH"
    constants: dict = field(default_factory=dict)
    dtype: _Dtype = "bfloat16"
    dtype_b: _Dtype | None = "float32"
    dtype_r: _Dtype | None = None
    dtype_w: _Dtype | None = None
    dtype_g: _Dtype | None = None
    dtype_s: _Dtype | None = None
    dtype_a: _Dtype | None = None
    enable_automatic_mixed_precision: bool = True
    initial_val: float | list[float] = 0.0
    _block_idx: int | None = field(default=0, repr=False)
    _num_blocks: int | None = field(default=1, repr=False)

    def __post_init__(self) -> None:
        _positive(self, "num_heads")
        _probability(self)
        _kernel_size(self)
        _one_of(self, "backend", ("vanilla", "cuda"))
        _one_of(self, "bias_init", BIAS_INITS)
        _one_of(self, "recurrent_weight_init", ("zeros", "standard"))
        for name, value in _FIXED.items():
            _one_of(self, name, (value,))
        clip = self.gradient_recurrent_clipval
        if clip is not None and not clip > 0:
            raise ValueError(f"gradient_recurrent_clipval is {clip}; it must be None or greater than 0")
        if self.embedding_dim > 0 and self.embedding_dim % self.num_heads:
            raise ValueError(
                f"num_heads is {self.num_heads}; it must divide embedding_dim, which is {self.embedding_dim}"
            )
        self.hidden_size = self.embedding_dim

    @property
    def head_dim(self) -> int:
        return self.embedding_dim // self.num_heads


@dataclass
class mLSTMBlockConfig(Loadable):
    """A residual block around an mLSTM layer."""

    mlstm: mLSTMLayerConfig = field(default_factory=mLSTMLayerConfig)
    _num_blocks: int | None = field(default=None, repr=False)
    _block_idx: int | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        self.mlstm._num_blocks = self._num_blocks
        self.mlstm.__post_init__()


@dataclass
class sLSTMBlockConfig(Loadable):
    """A residual block around an sLSTM layer, and another around a feed-forward layer unless `feedforward` is None."""

    slstm: sLSTMLayerConfig = field(default_factory=sLSTMLayerConfig)
    feedforward: FeedForwardConfig | None = field(default_factory=FeedForwardConfig)
    _num_blocks: int | None = field(default=None, repr=False)
    _block_idx: int | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        self.slstm._block_idx = self._block_idx
        self.slstm._num_blocks = self._num_blocks
        self.slstm.__post_init__()
        if self.feedforward is not None:
            if self.slstm.embedding_dim > 0:
                self.feedforward.embedding_dim = self.slstm.embedding_dim
            self.feedforward._num_blocks = self._num_blocks or 1
            self.feedforward.__post_init__()


@dataclass
class xLSTMBlockStackConfig(Loadable):
    """A stack of mLSTM and sLSTM blocks: xLSTM[a:b].

    Args:
        mlstm_block, slstm_block: configurations of the blocks. They are copied; the copies get the stack's
            `embedding_dim`, `bias`, `dropout` and `context_length`. Without `mlstm_block` every block is an sLSTM
            block.
        context_length: for compatibility; it bounds nothing.
        num_blocks, embedding_dim: depth and width.
        add_post_blocks_norm: a layer norm behind the last block.
        bias: of the mLSTM layers' projections.
        slstm_at: the sLSTM blocks' indices, or "all".

    Raises:
        ValueError: an index is out of range, a block has no configuration, or a size does not fit.
    """

    mlstm_block: mLSTMBlockConfig | None = None
    slstm_block: sLSTMBlockConfig | None = None
    context_length: int = -1
    num_blocks: int = 1
    embedding_dim: int = 128
    add_post_blocks_norm: bool = True
    bias: bool = False
    dropout: float = 0.0
    slstm_at: list[int] | Literal["all"] = field(default_factory=list)
    _block_map: str = field(default="", repr=False)

    def __post_init__(self) -> None:
        _positive(self, "num_blocks", "embedding_dim")
        _probability(self)
        self.mlstm_block = copy.deepcopy(self.mlstm_block)
        self.slstm_block = copy.deepcopy(self.slstm_block)
        if self.slstm_at == "all" or self.mlstm_block is None:
            self.slstm_at = list(range(self.num_blocks))
        block_map = [0] * self.num_blocks
        for index in self.slstm_at:
            if isinstance(index, str) or not -self.num_blocks <= index < self.num_blocks:
                raise ValueError(f"slstm_at holds {index!r}; it must hold indices of the {self.num_blocks} blocks")
            block_map[index] = 1
        if any(block_map) and self.slstm_block is None:
            raise ValueError(
                "slstm_block is None; it must be given where slstm_at or a missing mlstm_block asks for it"
            )
        self._block_map = ",".join(map(str, block_map))
        if self.mlstm_block is not None:
            mlstm = self.mlstm_block.mlstm
            mlstm.embedding_dim, mlstm.bias, mlstm.dropout = self.embedding_dim, self.bias, self.dropout
            mlstm.context_length = self.context_length
            self.mlstm_block._num_blocks = self.num_blocks
            self.mlstm_block.__post_init__()
        if self.slstm_block is not None:
            slstm = self.slstm_block.slstm
            slstm.embedding_dim, slstm.dropout = self.embedding_dim, self.dropout
            self.slstm_block._num_blocks = self.num_blocks
            self.slstm_block.__post_init__()

    @property
    def block_map(self) -> list[int]:
        """The kind of each block: 0 for an mLSTM block, 1 for an sLSTM block."""
        return [int(kind) for kind in self._block_map.split(",")]


@dataclass
class xLSTMLMModelConfig(xLSTMBlockStackConfig):
    """A language model around a stack.

    Args:
        vocab_size: number of tokens.
        tie_weights: whether the output layer shares the embedding's weight.
        weight_decay_on_embedding: whether the embedding is in the optimizer's group with weight decay.
        add_embedding_dropout: whether `dropout` also follows the embedding.
    """

    vocab_size: int = -1
    tie_weights: bool = False
    weight_decay_on_embedding: bool = False
    add_embedding_dropout: bool = False

    def __post_init__(self) -> None:
        _positive(self, "vocab_size")
        super().__post_init__()
