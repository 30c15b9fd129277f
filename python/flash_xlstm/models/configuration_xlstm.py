"""The configuration of the xLSTM model."""

from __future__ import annotations

import copy
import math
import numbers
from typing import Any

from transformers import PreTrainedConfig

# What each accepted kernel name runs. "flash" is the compiled op of this package; the rest are its plain
# PyTorch references (flash_xlstm.reference).
CHUNKWISE_KERNELS = {
    "chunkwise--native_autograd": "flash",  # the default, and what existing checkpoints say
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
# Elsewhere this kernel takes the tokens that do not fill a chunk; here every kernel takes any length.
SEQUENCE_KERNELS = (
    "native_sequence__native",
    "native_sequence__triton",
    "native_sequence__triton_step_fused",
)
STEP_KERNELS = {"native": "flash", "triton": "flash", "triton_fused": "flash", "reference": "reference"}

MODES = ("train", "train_with_padding", "inference")
DTYPES = ("float32", "bfloat16", "float16")
WEIGHT_MODES = ("single", "fused")

# Values that transformers' own xLSTMConfig accepts, and the fallback a saved config.json shows in place of
# others.
_PORTABLE = {
    "chunkwise_kernel": ("chunkwise--native_autograd", "parallel--native_autograd"),
    "sequence_kernel": ("native_sequence__native",),
    "step_kernel": ("native",),
    "weight_mode": ("single",),
}
_OWN_VALUES = "flash_xlstm"


class _Default(int):
    """A default value that can be told from the same number passed by the caller."""


def _same(first_name: str, first: int, second_name: str, second: int | None) -> int:
    """The value of two names for one parameter."""
    value = first if second is None else second
    if value != first and not isinstance(first, _Default):
        raise ValueError(
            f"{first_name} is {first} and {second_name} is {second}; they are two names of one size and must "
            "be equal (give one of them)"
        )
    return int(value) if _is_whole(value) else value  # no _Default; what is no number check() refuses


def _is_whole(value: object) -> bool:
    return isinstance(value, numbers.Integral) and not isinstance(value, bool)


class xLSTMConfig(PreTrainedConfig):
    """Configuration of :class:`xLSTMModel` and :class:`xLSTMForCausalLM`; defaults as in the xLSTM 7B.

    Args:
        vocab_size: number of tokens.
        hidden_size, embedding_dim: width of the residual stream; two names of one size.
        num_hidden_layers, num_blocks: number of blocks; two names of one number.
        num_heads: heads of each mLSTM layer; must divide the sizes of queries, keys and values.
        use_bias: biases in linear layers and norms (the input and forget gates always have one, the output
            norm and the LM head never).
        norm_reduction_force_float32: accepted for compatibility; norms always reduce in float32.
        tie_word_embeddings: the LM head uses the embedding's weight.
        add_out_norm: a norm behind the last block.
        norm_eps: epsilon of the norms.
        qk_dim_factor, v_dim_factor: sizes of queries and keys, and of values, as factors of hidden_size
            (rounded down).
        chunkwise_kernel: what runs over sequences; see the table.
        sequence_kernel: accepted for compatibility; the chunkwise kernel takes sequences of every length.
        step_kernel: what decodes one token; see the table.
        mode: "inference" always makes the last states available (the cache); "train" and "train_with_padding"
            do so if return_last_states. Every mode takes sequences of any length, without padding them.
        chunk_size: tokens a kernel processes together; speed only. The default leaves the choice to the
            compiled kernels.
        return_last_states: whether the training modes can return a cache.
        autocast_kernel_dtype: dtype in which q, k and v enter the kernel where torch.autocast is on.
        eps: epsilon of the mLSTM cell.
        inference_state_dtype: dtype in which a cache holds the matrix memory; normalizer and stabilizer stay
            float32.
        ffn_proj_factor, ffn_round_up_to_multiple_of: size of the feed-forward layer, as a factor of
            hidden_size, rounded up to a multiple.
        gate_soft_cap, output_logit_soft_cap: soft caps of the gates and the logits; None for no cap.
        weight_mode: "single" keeps parallel linear layers apart, "fused" stacks them (faster on small
            batches). Checkpoints of either load in both. They are always saved in single form, which other
            libraries read.
        use_cache: whether a forward pass returns a cache by default; see :meth:`xLSTMModel.forward`.
        pad_token_id, bos_token_id, eos_token_id: special tokens, for generation.
        max_inference_chunksize: without gradients, longer prompts are processed in pieces of this many
            tokens, which bounds memory and changes no result.
        kwargs: passed to ``PreTrainedConfig``.

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

    The default names are ``native`` ones; they run compiled here so that existing checkpoints, which carry
    them, are fast. A saved ``config.json`` holds only names that transformers' xLSTMConfig reads; others are
    kept beside them.

    Raises:
        ValueError: an unknown name, a size that does not divide, two names of one size that disagree, a value
            out of range. All at construction.
    """

    model_type = "xlstm"
    attribute_map = {"embedding_dim": "hidden_size", "num_blocks": "num_hidden_layers"}  # noqa: RUF012
    keys_to_ignore_at_inference = ["cache_params"]  # noqa: RUF012

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
        output_logit_soft_cap: float | None = 30.0,
        weight_mode: str = "single",
        use_cache: bool = True,
        pad_token_id: int | None = 1,
        bos_token_id: int | None = 0,
        eos_token_id: int | list[int] | None = 2,
        max_inference_chunksize: int = 16384,
        **kwargs: Any,
    ) -> None:
        own_values = kwargs.pop(_OWN_VALUES, None) or {}
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
        """Size of queries and of keys, all heads together."""
        return int(self.hidden_size * self.qk_dim_factor)

    @property
    def v_dim(self) -> int:
        """Size of values, all heads together."""
        return int(self.hidden_size * self.v_dim_factor)

    @property
    def qk_head_dim(self) -> int:
        """Size of queries and of keys in one head."""
        return self.qk_dim // self.num_heads

    @property
    def v_head_dim(self) -> int:
        """Size of values in one head."""
        return self.v_dim // self.num_heads

    @property
    def ffn_dim(self) -> int:
        """Size inside the feed-forward layer."""
        step = self.ffn_round_up_to_multiple_of
        return int((self.hidden_size * self.ffn_proj_factor + step - 1) // step * step)

    def check(self) -> None:
        """Checks every value; models call it again, since attributes can be set after construction.

        Raises:
            ValueError: naming the parameter, its value and what it must be.
        """
        for name in (
            "vocab_size", "hidden_size", "num_hidden_layers", "num_heads", "chunk_size",
            "ffn_round_up_to_multiple_of", "max_inference_chunksize",
        ):  # fmt: skip
            value = getattr(self, name)
            if not _is_whole(value) or value < 1:
                raise ValueError(f"{name} is {value!r}; it must be a whole number of at least 1")
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
            if getattr(self, name) not in choices:
                raise ValueError(f"{name} is {getattr(self, name)!r}; it must be one of: {', '.join(choices)}")
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
        if not number or not 0 < float(value) < math.inf:
            raise ValueError(f"{name} is {value!r}; it must be a finite number greater than 0")

    def to_dict(self) -> dict[str, Any]:
        """All parameters, with both names of those that have two."""
        values = super().to_dict()
        for alias, name in self.attribute_map.items():
            values[alias] = values[name]
        return values

    def save_pretrained(self, save_directory: Any, *args: Any, **kwargs: Any) -> None:
        """Writes ``config.json``. Values that only this package knows are kept under ``"flash_xlstm"``, and
        the names themselves get the nearest value that transformers reads."""
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
