"""What vLLM must know of an xLSTM before it builds one: lengths, heads, block sizes, and what is refused."""

from __future__ import annotations

import math
from typing import Any

import torch
from vllm.model_executor.models.config import MambaModelConfig
from vllm.transformers_utils.model_arch_config_convertor import ModelArchConfigConvertorBase

# An xLSTM has no largest length. vLLM keeps the ids of max_num_seqs rows of this many tokens, 4 bytes each.
DEFAULT_LENGTH = 131_072
LARGEST_LENGTH = 2**24

_C_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


class xLSTMConvertor(ModelArchConfigConvertorBase):
    """Reads an xLSTM's configuration for vLLM."""

    def get_total_num_attention_heads(self) -> int:
        return self.hf_text_config.num_heads  # with 0, vLLM's check of tensor parallel passes anything

    def derive_max_model_len_and_key(self) -> tuple[float, str | None]:
        length, key = super().derive_max_model_len_and_key()
        return (LARGEST_LENGTH, "the largest of this package") if key is None else (length, key)


class xLSTMSettings(MambaModelConfig):
    """Completes and checks vLLM's configuration."""

    @classmethod
    def verify_and_update_model_config(cls, model_config: Any) -> None:
        if model_config.original_max_model_len in (None, -1) and model_config.max_model_len == LARGEST_LENGTH:
            model_config.max_model_len = DEFAULT_LENGTH

    @classmethod
    def verify_and_update_config(cls, vllm_config: Any) -> None:
        """Sets the block size, which without this stays None.

        Raises:
            ValueError: the model cannot run like this.
        """
        super().verify_and_update_config(vllm_config)
        if vllm_config.speculative_config is not None:
            raise ValueError("speculative decoding is set; an xLSTM cannot take back tokens: leave it out")
        _set_c_dtype(vllm_config)
        check_sizes(vllm_config)


def c_dtype(vllm_config: Any) -> torch.dtype:
    """The dtype of c in the cache."""
    return _C_DTYPES[vllm_config.model_config.hf_config.inference_state_dtype]


def _set_c_dtype(vllm_config: Any) -> None:
    """Writes to the checkpoint's configuration what ``--mamba-ssm-cache-dtype`` says, or else ``--mamba-cache-dtype``.

    On CPUs with bfloat16 instructions vLLM later sets its own copy of the first to float32, for another model's kernel.

    Raises:
        ValueError: the dtype is neither float32 nor bfloat16.
    """
    cache, config = vllm_config.cache_config, vllm_config.model_config.hf_config
    given = {"mamba_ssm_cache_dtype": cache.mamba_ssm_cache_dtype, "mamba_cache_dtype": cache.mamba_cache_dtype}
    given["inference_state_dtype"] = config.inference_state_dtype
    name, dtype = next((name, dtype) for name, dtype in given.items() if dtype != "auto")
    if dtype not in _C_DTYPES:
        raise ValueError(f"{name} is {dtype!r}; the matrix memory of an xLSTM must be float32 or bfloat16")
    config.inference_state_dtype = dtype


def check_sizes(vllm_config: Any) -> None:
    """Raises ValueError where tensor parallel does not divide the model, or n would not be aligned behind c."""
    config, ranks = vllm_config.model_config.hf_config, vllm_config.parallel_config.tensor_parallel_size
    for name in ("num_heads", "ffn_dim"):
        size = getattr(config, name)
        if size % ranks:
            raise ValueError(f"tensor_parallel_size is {ranks}; it must divide {name}, which is {size}")
    shape, dtype = state_shapes(vllm_config)[0], c_dtype(vllm_config)
    if math.prod(shape) * dtype.itemsize % 4:
        raise ValueError(f"c of a rank has shape {shape} in {dtype}; it must be a multiple of 4 bytes: take float32")


def state_shapes(vllm_config: Any) -> tuple[tuple[int, int, int], tuple[int, int], tuple[int]]:
    """The shapes of c, n and m in a block of the cache, on a rank.

    A block's page holds the three in a row, and the next block's page follows. m is declared longer than the heads, so
    that a page is a multiple of 16 bytes. c then begins at one in every block, which the kernels read fastest.
    """
    config = vllm_config.model_config.hf_config
    heads = config.num_heads // vllm_config.parallel_config.tensor_parallel_size
    c, n = (heads, config.qk_head_dim, config.v_head_dim), (heads, config.qk_head_dim)
    page = math.prod(c) * c_dtype(vllm_config).itemsize + (math.prod(n) + heads) * 4
    return c, n, (heads + -page % 16 // 4,)
