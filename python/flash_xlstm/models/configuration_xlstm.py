"""The configuration of the xLSTM model."""

from __future__ import annotations

import copy
import dataclasses
import numbers
from collections.abc import Iterable
from typing import Any

import torch
from transformers import PreTrainedConfig

# The implementation behind each kernel name. "flash" is the compiled op; the others are forms of flash_xlstm.reference.
CHUNKWISE_KERNELS = {
    "chunkwise--native_autograd": "flash",  # the default, and the name in existing checkpoints
    "chunkwise--triton_limit_chunk": "flash",
    "chunkwise--triton_xl_chunk": "flash",
    "parallel--triton_limit_headdim": "flash",
    "chunkwise--native_custbw": "chunkwise",
    "parallel--native_autograd": "parallel",
    "parallel--native_custbw": "parallel",
    "parallel--native_stablef_autograd": "parallel",
    "parallel--native_stablef_custbw": "parallel",
    "chunkwise--reference": "chunkwise",
    "parallel--reference": "parallel",
    "recurrent--reference": "recurrent",
}
# In transformers this kernel runs the tokens that do not fill a chunk. Here every kernel takes any length.
SEQUENCE_KERNELS = (
    "native_sequence__native",
    "native_sequence__triton",
    "native_sequence__triton_step_fused",
)
STEP_KERNELS = {"native": "flash", "triton": "flash", "triton_fused": "flash", "reference": "reference"}

MODES = ("train", "train_with_padding", "inference")
DTYPES = ("float32", "bfloat16", "float16")
WEIGHT_MODES = ("single", "fused")

# Values that transformers' xLSTMConfig accepts, and the fallback that a saved config.json has in place of others.
_PORTABLE = {
    "chunkwise_kernel": ("chunkwise--native_autograd", "parallel--native_autograd"),
    "sequence_kernel": ("native_sequence__native",),
    "step_kernel": ("native",),
    "weight_mode": ("single",),
}
_OWN_VALUES = "flash_xlstm"

# Upper bounds of whole numbers. A larger value is a mistake that would otherwise show only as exhausted memory or time.
_MOST = {
    "num_hidden_layers": 10_000,
    "chunk_size": 4096,  # the kernels' bound
    "max_inference_chunksize": 2**63 - 1,
}
_MOST_OF_A_SIZE = 2**31 - 1
_MOST_LABELS = 1_000_000

_BOOLS = (
    "use_bias", "norm_reduction_force_float32", "tie_word_embeddings", "add_out_norm", "return_last_states",
    "use_cache",
)  # fmt: skip

# Parameters of every transformers model that are not plain attributes of the class, or have another name there.
_SETTABLE = (
    "name_or_path", "num_labels", "output_attentions", "torch_dtype", "attn_implementation", "_attn_implementation",
    "experts_implementation", "_experts_implementation", "model_type", "rope_scaling", "per_layer_config",
)  # fmt: skip

# Attributes that transformers reads in configurations of other models. An xLSTM has no such parts.
_ABSENT = (
    "text_config", "text_encoder", "decoder", "encoder", "generator", "rope_scaling", "rope_parameters",
    "per_layer_config",
)  # fmt: skip

_FLOAT32 = torch.finfo(torch.float32)

_PROBLEM_TYPES = ("regression", "single_label_classification", "multi_label_classification")


class _Default(int):
    """A default value. Its type distinguishes it from the same number passed by the caller."""


class _DefaultFloat(float):
    """As :class:`_Default`, for a float."""


def _is_name(value: Any) -> bool:
    return isinstance(value, str)


def _is_flag(value: Any) -> bool:
    return isinstance(value, bool)


def _is_names(value: Any) -> bool:
    return isinstance(value, (list, tuple)) and all(map(_is_name, value))


def _is_dtype(value: Any) -> bool:
    dtype = getattr(torch, value, None) if isinstance(value, str) else value
    return isinstance(dtype, torch.dtype) and dtype.is_floating_point


def _is_eager(value: Any) -> bool:
    return all(v is None or v == "eager" for v in (value.values() if isinstance(value, dict) else [value]))


def _is_label(value: Any) -> bool:
    return _is_whole(value) or (_is_name(value) and value.isdecimal() and value.isascii() and len(value) < 20)


def _is_label_names(value: Any) -> bool:
    return isinstance(value, dict) and all(_is_label(k) and _is_name(v) for k, v in value.items())


def _is_label_ids(value: Any) -> bool:
    return isinstance(value, dict) and all(_is_name(k) and _is_label(v) for k, v in value.items())


def _is_quantization(value: Any) -> bool:
    return hasattr(value, "to_dict") or (isinstance(value, dict) and all(map(_is_name, value)))


# Parameters of every transformers model: the type of a value that is not None.
_COMMON: dict[str, tuple[Any, str]] = {
    "transformers_version": (_is_name, "a string"),
    "architectures": (_is_names, "a list of strings"),
    "output_hidden_states": (_is_flag, "True or False"),
    "output_attentions": (_is_flag, "True or False"),
    "return_dict": (_is_flag, "True or False"),
    "is_encoder_decoder": (lambda value: value is False, "False: an xLSTM has no encoder"),
    "chunk_size_feed_forward": (lambda value: _is_whole(value) and value >= 0, "a whole number of at least 0"),
    "dtype": (_is_dtype, "a floating-point dtype of torch"),
    "torch_dtype": (_is_dtype, "a floating-point dtype of torch"),
    "name_or_path": (lambda value: hasattr(value, "__fspath__") or _is_name(value), "a string"),
    "_name_or_path": (lambda value: hasattr(value, "__fspath__") or _is_name(value), "a string"),
    "attn_implementation": (_is_eager, "'eager': there is nothing to choose in an xLSTM"),
    "_attn_implementation": (_is_eager, "'eager': there is nothing to choose in an xLSTM"),
    "experts_implementation": (_is_eager, "'eager': there is nothing to choose in an xLSTM"),
    "_experts_implementation": (_is_eager, "'eager': there is nothing to choose in an xLSTM"),
    "num_labels": (lambda value: _is_whole(value) and 0 < value <= _MOST_LABELS, f"from 1 to {_MOST_LABELS}"),
    "id2label": (_is_label_names, "a dict from whole numbers to strings"),
    "label2id": (_is_label_ids, "a dict from strings to whole numbers"),
    "problem_type": (lambda value: _is_name(value) and value in _PROBLEM_TYPES, f"one of: {', '.join(_PROBLEM_TYPES)}"),
    "quantization_config": (_is_quantization, "a dict"),
    "compression_config": (_is_quantization, "a dict"),
    "layer_types": (_is_names, "a list of strings"),
    "mlp_layer_types": (_is_names, "a list of strings"),
    "mtp_layer_types": (_is_names, "a list of strings"),
    "_output_attentions": (_is_flag, "True or False"),
    "auto_map": (lambda value: isinstance(value, dict), "a dict"),
    _OWN_VALUES: (lambda value: isinstance(value, dict), "a dict"),
}


def _same(first_name: str, first: Any, second_name: str, second: Any) -> Any:
    """The value of a size that has two names."""
    value = first if second is None else second
    if value != first and not isinstance(first, _Default):
        raise ValueError(
            f"{first_name} is {_shown(first)} and {second_name} is {_shown(second)}; they are two names of one size "
            "and must be equal (give one of them)"
        )
    return int(value) if _is_whole(value) else value  # drops _Default; check() refuses other types


def _is_whole(value: object) -> bool:
    return isinstance(value, numbers.Integral) and not isinstance(value, bool)


def _shown(value: object) -> str:
    """A value for a message, cut to one line."""
    if isinstance(value, int) and abs(value) >= 2**256:  # Python refuses to print very long integers
        return f"a whole number of {value.bit_length()} bits"
    try:
        text = repr(value)
    except Exception:
        text = f"a {type(value).__name__}"
    return text if len(text) <= 100 else f"{text[:97]}..."


def _check_names(config: type[PreTrainedConfig], names: Iterable[str]) -> None:
    """Checks that no name is an attribute or a method of the class."""
    fields = dataclasses.fields(config) if dataclasses.is_dataclass(config) else ()
    settable = {*(field.name for field in fields), *_SETTABLE, *config.attribute_map}
    for name in names:
        if hasattr(config, name) and name not in settable:
            raise ValueError(f"{name} is an attribute of {config.__name__} itself, which no value can replace")


class xLSTMConfig(PreTrainedConfig):
    """Configuration of :class:`xLSTMModel` and :class:`xLSTMForCausalLM`; defaults as in the xLSTM 7B.

    Args:
        vocab_size: size of the vocabulary.
        hidden_size, embedding_dim: width of the residual stream, under two names.
        num_hidden_layers, num_blocks: number of blocks, under two names.
        num_heads: heads of each mLSTM layer; must divide the sizes of queries, keys and values.
        use_bias: whether linear layers and norms have biases. The input and forget gates always have one, the output
            norm and the LM head never.
        norm_reduction_force_float32: accepted for compatibility; norms always reduce in float32.
        tie_word_embeddings: the LM head uses the embedding's weight.
        add_out_norm: a norm behind the last block.
        norm_eps: epsilon of the norms.
        qk_dim_factor, v_dim_factor: sizes of queries and keys, and of values, as factors of hidden_size
            (rounded down).
        chunkwise_kernel: runs sequences; see the table.
        sequence_kernel: accepted for compatibility; the chunkwise kernel takes sequences of every length.
        step_kernel: decodes one token; see the table.
        mode: "inference" can always return the last states (the cache); "train" and "train_with_padding" only with
            `return_last_states`. Every mode takes sequences of any length, without padding.
        chunk_size: tokens that a kernel processes together. It changes the speed only. The default lets the compiled
            kernels choose.
        return_last_states: whether the training modes can return a cache.
        autocast_kernel_dtype: dtype in which q, k and v enter the kernel where torch.autocast is on.
        eps: epsilon of the mLSTM cell.
        inference_state_dtype: dtype in which a cache holds the matrix memory; normalizer and stabilizer stay
            float32.
        ffn_proj_factor, ffn_round_up_to_multiple_of: size of the feed-forward layer, as a factor of
            hidden_size, rounded up to a multiple.
        gate_soft_cap, output_logit_soft_cap: soft caps of the gates and the logits; None for no cap.
            `final_logit_softcapping` is another name of `output_logit_soft_cap`, for code that computes logits itself.
        weight_mode: "single" keeps parallel linear layers apart. "fused" stacks them, which is faster on small batches.
            Either mode loads checkpoints of both. Checkpoints are saved in single form, which other libraries read.
        use_cache: whether a forward pass returns a cache by default; see :meth:`xLSTMModel.forward`.
        pad_token_id, bos_token_id, eos_token_id: special tokens, for generation.
        max_inference_chunksize: tokens of a piece. Without gradients, longer prompts are processed in pieces, which
            bounds memory and changes no result.
        kwargs: passed to ``PreTrainedConfig``. Unknown names become attributes. Names of the class's attributes and
            methods (`save_pretrained`, `qk_dim`) are refused.

    Kernel names. "Compiled" is this package's C++ and CUDA op, "reference" its plain PyTorch form:

    ========================================================  ==========
    chunkwise_kernel                                          runs
    ========================================================  ==========
    ``chunkwise--native_autograd`` (default),                 compiled
    ``chunkwise--triton_xl_chunk``,
    ``chunkwise--triton_limit_chunk``,
    ``parallel--triton_limit_headdim``
    ``parallel--native_autograd``, ``parallel--reference``,   reference, quadratic in the length
    ``parallel--native_custbw``,
    ``parallel--native_stablef_autograd``,
    ``parallel--native_stablef_custbw``
    ``chunkwise--reference``, ``chunkwise--native_custbw``    reference, chunk by chunk
    ``recurrent--reference``                                  reference, token by token
    ========================================================  ==========

    ========================================================  ==========
    step_kernel                                               runs
    ========================================================  ==========
    ``native`` (default), ``triton``, ``triton_fused``        compiled
    ``reference``                                             reference
    ========================================================  ==========

    Existing checkpoints have the default ``native`` names, which therefore run compiled. A saved ``config.json`` has a
    name that transformers' xLSTMConfig reads under the usual key, and any other name under ``"flash_xlstm"``.

    Raises:
        ValueError: an unknown name, a size that does not divide, two names of one size that disagree, a value
            out of range or of a wrong type. All at construction.
    """

    model_type = "xlstm"
    attribute_map = {  # noqa: RUF012
        "embedding_dim": "hidden_size",
        "num_blocks": "num_hidden_layers",
        "final_logit_softcapping": "output_logit_soft_cap",
    }
    # The cache, by its name here, and by those in the outputs of transformers' own classes.
    keys_to_ignore_at_inference = ["cache_params", "cache", "past_key_values"]  # noqa: RUF012

    def __init__(
        self,
        vocab_size: int = 50304,
        hidden_size: int = _Default(4096),
        embedding_dim: int | None = None,
        num_hidden_layers: int | None = _Default(32),
        num_blocks: int | None = None,
        num_heads: int = 8,
        use_bias: bool = False,
        norm_reduction_force_float32: bool = True,
        tie_word_embeddings: bool = False,
        add_out_norm: bool = True,
        norm_eps: float = 1e-6,
        qk_dim_factor: float = 0.5,
        v_dim_factor: float = 1.0,
        chunkwise_kernel: str = "chunkwise--native_autograd",
        sequence_kernel: str = "native_sequence__native",
        step_kernel: str = "native",
        mode: str = "inference",
        chunk_size: int = 64,
        return_last_states: bool = True,
        autocast_kernel_dtype: str = "bfloat16",
        eps: float = 1e-6,
        inference_state_dtype: str = "float32",
        ffn_proj_factor: float = 2.667,
        ffn_round_up_to_multiple_of: int = 64,
        gate_soft_cap: float | None = 15.0,
        output_logit_soft_cap: float | None = _DefaultFloat(30.0),
        weight_mode: str = "single",
        use_cache: bool = True,
        pad_token_id: int | None = 1,
        bos_token_id: int | None = 0,
        eos_token_id: int | list[int] | None = 2,
        max_inference_chunksize: int = 16384,
        **kwargs: Any,
    ) -> None:
        _check_names(type(self), kwargs)
        for name, (fits, meaning) in _COMMON.items():
            value = kwargs.get(name)
            if value is not None and not fits(value):
                raise ValueError(f"{name} is {_shown(value)}; it must be {meaning}")
        for name in _ABSENT:
            if kwargs.get(name) is not None:
                raise ValueError(f"{name} is {_shown(kwargs[name])}; an xLSTM has none: leave it out")
        if kwargs.get("model_type", self.model_type) != self.model_type:
            raise ValueError(f"model_type is {_shown(kwargs['model_type'])}; it must be {self.model_type!r}")
        other_cap = kwargs.pop("final_logit_softcapping", output_logit_soft_cap)
        if isinstance(output_logit_soft_cap, _DefaultFloat):
            output_logit_soft_cap = float(other_cap) if isinstance(other_cap, _DefaultFloat) else other_cap
        elif other_cap != output_logit_soft_cap:
            raise ValueError(
                f"output_logit_soft_cap is {_shown(output_logit_soft_cap)} and final_logit_softcapping is "
                f"{_shown(other_cap)}; they are two names of one number and must be equal (give one of them)"
            )
        own_values = kwargs.pop(_OWN_VALUES, None) or {}
        # None is not allowed for any of these.
        kwargs = {n: v for n, v in kwargs.items() if v is not None or n not in (*_ABSENT, "num_labels")}
        super().__init__(**kwargs)
        hidden_size = _Default(4096) if hidden_size is None else hidden_size
        num_hidden_layers = _Default(32) if num_hidden_layers is None else num_hidden_layers
        self.vocab_size = vocab_size
        self.hidden_size = _same("hidden_size", hidden_size, "embedding_dim", embedding_dim)
        self.num_hidden_layers = _same("num_hidden_layers", num_hidden_layers, "num_blocks", num_blocks)
        self.num_heads = num_heads
        self.use_bias = use_bias
        self.norm_reduction_force_float32 = norm_reduction_force_float32
        self.tie_word_embeddings = tie_word_embeddings
        self.add_out_norm = add_out_norm
        self.norm_eps = norm_eps
        self.qk_dim_factor = qk_dim_factor
        self.v_dim_factor = v_dim_factor
        self.chunkwise_kernel = chunkwise_kernel
        self.sequence_kernel = sequence_kernel
        self.step_kernel = step_kernel
        self.mode = mode
        self.chunk_size = chunk_size
        self.return_last_states = return_last_states
        self.autocast_kernel_dtype = autocast_kernel_dtype
        self.eps = eps
        self.inference_state_dtype = inference_state_dtype
        self.ffn_proj_factor = ffn_proj_factor
        self.ffn_round_up_to_multiple_of = ffn_round_up_to_multiple_of
        self.gate_soft_cap = gate_soft_cap
        self.output_logit_soft_cap = output_logit_soft_cap
        self.weight_mode = weight_mode
        self.use_cache = use_cache
        self.pad_token_id = pad_token_id
        self.bos_token_id = bos_token_id
        self.eos_token_id = eos_token_id
        self.max_inference_chunksize = max_inference_chunksize
        for name, value in own_values.items():
            if name in _PORTABLE:
                setattr(self, name, value)
        self.check()

    @property
    def qk_dim(self) -> int:
        """Size of the queries (and of the keys) of all heads together."""
        return int(self.hidden_size * self.qk_dim_factor)

    @property
    def v_dim(self) -> int:
        """Size of the values of all heads together."""
        return int(self.hidden_size * self.v_dim_factor)

    @property
    def qk_head_dim(self) -> int:
        """Size of a head's queries and keys."""
        return self.qk_dim // self.num_heads

    @property
    def v_head_dim(self) -> int:
        """Size of a head's values."""
        return self.v_dim // self.num_heads

    @property
    def ffn_dim(self) -> int:
        """Inner size of the feed-forward layer."""
        step = self.ffn_round_up_to_multiple_of
        return int((self.hidden_size * self.ffn_proj_factor + step - 1) // step * step)

    def check(self) -> None:
        """Checks every value that belongs to the xLSTM. Models call it again, because attributes may be set after
        construction.

        Raises:
            ValueError: a value is wrong. The text has the parameter, its value and what it must be.
        """
        for name in (
            "vocab_size", "hidden_size", "num_hidden_layers", "num_heads", "chunk_size",
            "ffn_round_up_to_multiple_of", "max_inference_chunksize",
        ):  # fmt: skip
            value, most = getattr(self, name), _MOST.get(name, _MOST_OF_A_SIZE)
            if not _is_whole(value) or not 1 <= value <= most:
                raise ValueError(f"{name} is {_shown(value)}; it must be a whole number from 1 to {most}")
        for name in _BOOLS:
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"{name} is {_shown(getattr(self, name))}; it must be True or False")
        for name in ("pad_token_id", "bos_token_id", "eos_token_id"):
            value = getattr(self, name)
            several = name == "eos_token_id" and isinstance(value, (list, tuple))
            for token in value if several else (value,):
                if token is not None and not (_is_whole(token) and abs(token) <= _MOST_OF_A_SIZE):
                    raise ValueError(f"{name} is {_shown(value)}; it must be a token id or None")
        for name in ("qk_dim_factor", "v_dim_factor", "ffn_proj_factor", "norm_eps", "eps"):
            self._check_positive(name)
        for name in ("gate_soft_cap", "output_logit_soft_cap"):
            if getattr(self, name) is not None:
                self._check_positive(name)
        for name, choices in {
            "chunkwise_kernel": CHUNKWISE_KERNELS,
            "sequence_kernel": SEQUENCE_KERNELS,
            "step_kernel": STEP_KERNELS,
            "mode": MODES,
            "autocast_kernel_dtype": DTYPES,
            "inference_state_dtype": DTYPES,
            "weight_mode": WEIGHT_MODES,
        }.items():
            value = getattr(self, name)
            if not isinstance(value, str) or value not in choices:
                raise ValueError(f"{name} is {_shown(value)}; it must be one of: {', '.join(choices)}")
        for name in ("qk_dim_factor", "v_dim_factor", "ffn_proj_factor"):
            size = self.hidden_size * getattr(self, name)
            if size + self.ffn_round_up_to_multiple_of > _MOST_OF_A_SIZE:
                raise ValueError(
                    f"{name} is {getattr(self, name)!r}, which makes a layer of {size:.3g} with hidden_size "
                    f"{self.hidden_size}; it must have at most {_MOST_OF_A_SIZE}"
                )
        for name in ("qk_dim", "v_dim"):
            size = getattr(self, name)
            if size < 1 or size % self.num_heads:
                raise ValueError(
                    f"{name} is {size} (hidden_size {self.hidden_size} x {name}_factor "
                    f"{getattr(self, name + '_factor')}); it must be a positive multiple of num_heads, "
                    f"which is {self.num_heads}"
                )

    def _check_positive(self, name: str) -> None:
        value = getattr(self, name)
        number = isinstance(value, numbers.Real) and not isinstance(value, bool)
        if not number or not _FLOAT32.tiny <= value <= _FLOAT32.max:  # the kernels take float32
            raise ValueError(f"{name} is {_shown(value)}; it must be a number greater than 0, finite as float32")

    @classmethod
    def get_config_dict(cls, pretrained_model_name_or_path: Any, **kwargs: Any) -> Any:
        """As ``PreTrainedConfig.get_config_dict``."""
        try:
            return super().get_config_dict(pretrained_model_name_or_path, **kwargs)
        except RecursionError as error:
            raise ValueError(f"the configuration of {pretrained_model_name_or_path} is nested too deeply") from error

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """As ``PreTrainedConfig.from_dict``.

        Raises:
            ValueError, TypeError: a name or a value that an xLSTM's configuration cannot have.
        """
        if not isinstance(config_dict, dict):
            raise TypeError(f"the configuration is {_shown(config_dict)}; it must be a mapping of names to values")
        _check_names(cls, kwargs)
        result = super().from_dict(config_dict, **kwargs)
        config = result[0] if isinstance(result, tuple) else result
        config.check()
        return result

    def to_dict(self) -> dict[str, Any]:
        """All parameters, under both names where there are two."""
        values = super().to_dict()
        for alias in ("embedding_dim", "num_blocks"):
            values[alias] = values[self.attribute_map[alias]]
        return values

    def save_pretrained(self, save_directory: Any, *args: Any, **kwargs: Any) -> None:
        """Writes ``config.json``. The key ``"flash_xlstm"`` holds values that only this package reads. Their usual keys
        hold the nearest value that transformers reads."""
        portable = copy.deepcopy(self)
        own = {}
        for name, values in _PORTABLE.items():
            value = getattr(self, name)
            if value not in values:
                own[name] = value
                setattr(portable, name, values[0])
        if own:
            setattr(portable, _OWN_VALUES, own)
        super(xLSTMConfig, portable).save_pretrained(save_directory, *args, **kwargs)
