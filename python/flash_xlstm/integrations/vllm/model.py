"""The xLSTM of :mod:`flash_xlstm.models` as a model of vLLM."""

# No `from __future__ import annotations`: vLLM finds the dynamic dimensions by the annotations of the forward.
from collections.abc import Iterable
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn
from vllm.compilation.decorators import support_torch_compile
from vllm.config import VllmConfig
from vllm.distributed import get_pp_group
from vllm.model_executor.layers.linear import MergedColumnParallelLinear, RowParallelLinear
from vllm.model_executor.layers.logits_processor import LogitsProcessor
from vllm.model_executor.layers.mamba.mamba_utils import get_temporal_copy_spec
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding
from vllm.model_executor.models.interfaces import (
    HasInnerState,
    IsAttentionFree,
    SupportsMambaPrefixCaching,
    SupportsPP,
)
from vllm.model_executor.models.utils import (
    AutoWeightsLoader,
    PPMissingLayer,
    WeightsMapper,
    make_empty_intermediate_tensors_factory,
    make_layers,
    maybe_prefix,
)
from vllm.sequence import IntermediateTensors

from flash_xlstm import ops
from flash_xlstm.integrations.vllm.layer import xLSTMLayer
from flash_xlstm.integrations.vllm.settings import c_dtype, state_shapes
from flash_xlstm.nn import RMSNorm


class xLSTMFeedForward(nn.Module):
    """As :class:`flash_xlstm.nn.FeedForward` in weight mode "fused", with a rank's features."""

    def __init__(self, vllm_config: VllmConfig, prefix: str) -> None:
        super().__init__()
        config, quantization = vllm_config.model_config.hf_config, vllm_config.quant_config
        self.proj_up_gate_z = MergedColumnParallelLinear(
            config.hidden_size,
            [config.ffn_dim] * 2,
            bias=config.use_bias,
            quant_config=quantization,
            prefix=f"{prefix}.proj_up_gate_z",
            return_bias=False,
        )
        self.proj_down = RowParallelLinear(
            config.ffn_dim,
            config.hidden_size,
            bias=config.use_bias,
            quant_config=quantization,
            prefix=f"{prefix}.proj_down",
            return_bias=False,
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.proj_down(ops.swiglu(self.proj_up_gate_z(x)))


class xLSTMBlock(nn.Module):
    """As :class:`flash_xlstm.nn.mLSTMBlock`. The sum of the residual stream is left to the next norm."""

    def __init__(self, vllm_config: VllmConfig, prefix: str) -> None:
        super().__init__()
        config = vllm_config.model_config.hf_config
        self.norm_mlstm = RMSNorm(config.hidden_size, config.norm_eps, use_bias=config.use_bias)
        self.mlstm_layer = xLSTMLayer(vllm_config, f"{prefix}.mlstm_layer")
        self.norm_ffn = RMSNorm(config.hidden_size, config.norm_eps, use_bias=config.use_bias)
        self.ffn = xLSTMFeedForward(vllm_config, f"{prefix}.ffn")

    def forward(self, x: Tensor, residual: Tensor | None) -> tuple[Tensor, Tensor]:
        """The new part of the residual stream and the rest of it; the stream is their sum."""
        if residual is None:
            normed, residual = self.norm_mlstm(x), x
        else:
            normed, residual = self.norm_mlstm(x, residual)
        normed, residual = self.norm_ffn(self.mlstm_layer(normed), residual)
        return self.ffn(normed), residual


@support_torch_compile
class xLSTMModel(nn.Module):
    """Embeddings, blocks and output norm; of a pipeline's stages each has its part."""

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__()
        config = vllm_config.model_config.hf_config
        pipeline = get_pp_group()
        tied = config.tie_word_embeddings and pipeline.is_last_rank
        self.embeddings: nn.Module = PPMissingLayer()
        if pipeline.is_first_rank or tied:
            self.embeddings = VocabParallelEmbedding(
                config.vocab_size, config.hidden_size, prefix=maybe_prefix(prefix, "embeddings")
            )
        self.start_layer, self.end_layer, self.blocks = make_layers(
            config.num_hidden_layers, lambda prefix: xLSTMBlock(vllm_config, prefix), prefix=f"{prefix}.blocks"
        )
        self.out_norm: nn.Module | None = None
        if config.add_out_norm:
            self.out_norm = RMSNorm(config.hidden_size, config.norm_eps) if pipeline.is_last_rank else PPMissingLayer()
        self.make_empty_intermediate_tensors = make_empty_intermediate_tensors_factory(
            ["hidden_states", "residual"], config.hidden_size
        )

    def embed_input_ids(self, input_ids: Tensor) -> Tensor:
        return self.embeddings(input_ids)

    def forward(
        self,
        input_ids: torch.Tensor | None,
        positions: torch.Tensor,
        intermediate_tensors: IntermediateTensors | None = None,
        inputs_embeds: torch.Tensor | None = None,
    ) -> torch.Tensor | IntermediateTensors:
        residual = None
        if not get_pp_group().is_first_rank:
            assert intermediate_tensors is not None
            x, residual = intermediate_tensors["hidden_states"], intermediate_tensors["residual"]
        elif inputs_embeds is not None:
            x = inputs_embeds
        else:
            x = self.embed_input_ids(input_ids)
        for block in islice(self.blocks, self.start_layer, self.end_layer):
            x, residual = block(x, residual)
        if not get_pp_group().is_last_rank:
            return IntermediateTensors({"hidden_states": x, "residual": residual})
        if residual is None:
            return x if self.out_norm is None else self.out_norm(x)
        return x + residual if self.out_norm is None else self.out_norm(x, residual)[0]


class xLSTMForCausalLM(nn.Module, HasInnerState, IsAttentionFree, SupportsPP, SupportsMambaPrefixCaching):
    """The xLSTM with a language-modelling head. Parameters have the names of weight mode "fused".

    Checkpoints in weight mode "single" (transformers', ours, NX-AI's) are stacked as they are read, tensor by tensor.
    """

    packed_modules_mapping = {  # noqa: RUF012  # quantized checkpoints name the parts
        "qkv_opreact": ["q", "k", "v", "ogate_preact"],
        "ifgate_preact": ["igate_preact", "fgate_preact"],
        "proj_up_gate_z": ["proj_up_gate", "proj_up"],
    }
    hf_to_vllm_mapper = WeightsMapper(
        orig_to_new_prefix={"embedding.": "backbone.embeddings."},  # NX-AI's xlstm_large
        orig_to_new_stacked={
            f"{layer}.{part}.": (f"{layer}.{stacked}.", place)
            for stacked, parts in packed_modules_mapping.items()
            for place, part in enumerate(parts)
            for layer in ("ffn" if stacked == "proj_up_gate_z" else "mlstm_layer",)
        },
    )

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__()
        config = vllm_config.model_config.hf_config
        config.check()
        self.config = config
        self.quant_config = vllm_config.quant_config
        self.backbone = xLSTMModel(vllm_config=vllm_config, prefix=maybe_prefix(prefix, "backbone"))
        self.lm_head: nn.Module = PPMissingLayer()
        if get_pp_group().is_last_rank:
            self.lm_head = ParallelLMHead(
                config.vocab_size,
                config.hidden_size,
                quant_config=vllm_config.quant_config,
                prefix=maybe_prefix(prefix, "lm_head"),
            )
            if config.tie_word_embeddings:
                self.lm_head = self.lm_head.tie_weights(self.backbone.embeddings)
        self.logits_processor = LogitsProcessor(config.vocab_size)
        self.make_empty_intermediate_tensors = self.backbone.make_empty_intermediate_tensors

    def embed_input_ids(self, input_ids: Tensor) -> Tensor:
        return self.backbone.embed_input_ids(input_ids)

    def forward(
        self,
        input_ids: Tensor | None,
        positions: Tensor,
        intermediate_tensors: IntermediateTensors | None = None,
        inputs_embeds: Tensor | None = None,
        **kwargs: Any,
    ) -> Tensor | IntermediateTensors:
        return self.backbone(input_ids, positions, intermediate_tensors, inputs_embeds)

    def compute_logits(self, hidden_states: Tensor) -> Tensor | None:
        """(rows, vocab_size) float32, with the soft cap; None on ranks that do not sample."""
        logits = self.logits_processor(self.lm_head, hidden_states)
        return None if logits is None else ops.soft_cap(logits.float(), self.config.output_logit_soft_cap)

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        return AutoWeightsLoader(self).load_weights(weights, mapper=self.hf_to_vllm_mapper)

    @classmethod
    def get_mamba_state_shape_from_config(cls, vllm_config: VllmConfig) -> tuple[tuple[int, ...], ...]:
        return state_shapes(vllm_config)

    @classmethod
    def get_mamba_state_dtype_from_config(cls, vllm_config: VllmConfig) -> tuple[torch.dtype, ...]:
        return c_dtype(vllm_config), torch.float32, torch.float32

    @classmethod
    def get_mamba_state_copy_func(cls) -> tuple[Any, ...]:
        return (get_temporal_copy_spec,) * 3
