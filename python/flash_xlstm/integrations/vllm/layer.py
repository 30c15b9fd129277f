"""The mLSTM layer: vLLM's linear layers, this package's kernels, and states in vLLM's cache."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from vllm.compilation.breakable_cudagraph import eager_break_during_capture
from vllm.distributed import get_tensor_model_parallel_world_size
from vllm.forward_context import get_forward_context
from vllm.model_executor.layers.linear import MergedColumnParallelLinear, RowParallelLinear
from vllm.model_executor.layers.mamba.abstract import MambaBase
from vllm.model_executor.model_loader.weight_utils import sharded_weight_loader
from vllm.model_executor.utils import set_weight_attrs
from vllm.utils.torch_utils import direct_register_custom_op
from vllm.v1.attention.backends.registry import MambaAttentionBackendEnum

from flash_xlstm import ops
from flash_xlstm.integrations.vllm.backend import metadata_of, xLSTMMetadata
from flash_xlstm.integrations.vllm.registration import BACKEND, OPERATOR
from flash_xlstm.integrations.vllm.settings import c_dtype, state_shapes
from flash_xlstm.nn import MultiHeadLayerNorm


class xLSTMLayer(nn.Module, MambaBase):
    """As :class:`flash_xlstm.nn.mLSTMLayer` in weight mode "fused", with a rank's heads.

    Args:
        vllm_config: vLLM's configuration.
        prefix: the layer's name in the model.
    """

    def __init__(self, vllm_config: Any, prefix: str) -> None:
        super().__init__()
        config, quantization = vllm_config.model_config.hf_config, vllm_config.quant_config
        self.heads = config.num_heads // get_tensor_model_parallel_world_size()
        self.qk, self.v = self.heads * config.qk_head_dim, self.heads * config.v_head_dim  # of this rank
        self.options: dict[str, Any] = {"eps": config.eps, "gate_soft_cap": config.gate_soft_cap}
        self.qkv_opreact = MergedColumnParallelLinear(
            config.hidden_size,
            [config.qk_dim, config.qk_dim, config.v_dim, config.v_dim],
            bias=config.use_bias,
            quant_config=quantization,
            prefix=f"{prefix}.qkv_opreact",
            return_bias=False,
        )
        self.ifgate_preact = MergedColumnParallelLinear(  # few and sensitive: never quantized
            config.hidden_size, [config.num_heads] * 2, bias=True, prefix=f"{prefix}.ifgate_preact", return_bias=False
        )
        self.multihead_norm = MultiHeadLayerNorm(
            self.heads, config.v_head_dim, config.norm_eps, use_bias=config.use_bias
        )
        for parameter in self.multihead_norm.parameters():
            set_weight_attrs(parameter, {"weight_loader": sharded_weight_loader(0)})
        self.out_proj = RowParallelLinear(
            config.v_dim,
            config.hidden_size,
            bias=config.use_bias,
            quant_config=quantization,
            prefix=f"{prefix}.out_proj",
            return_bias=False,
        )
        self.prefix = prefix
        self._state_shape, self._c_dtype = state_shapes(vllm_config), c_dtype(vllm_config)
        self.kv_cache = (torch.tensor([]),) * 3
        layers = vllm_config.compilation_config.static_forward_context
        if prefix in layers:
            raise ValueError(f"prefix is {prefix!r}; another layer has that name")
        layers[prefix] = self

    def forward(self, x: Tensor) -> Tensor:
        """(tokens, hidden_size) in and out."""
        z, gates = self.qkv_opreact(x), self.ifgate_preact(x)
        h = z.new_empty(z.shape[0], self.v)
        torch.ops.vllm.flash_xlstm_mlstm(z, gates, h, self.prefix)
        y = self.multihead_norm(h.view(1, -1, self.heads, self.v // self.heads), z[None, :, -self.v :])[0]
        return self.out_proj(y)

    def run(self, z: Tensor, gates: Tensor, out: Tensor, metadata: xLSTMMetadata | None) -> None:
        """Writes h of a step's tokens to `out`, and their states to the cache. Rows of padding keep what they have."""
        q, k, v, _ = z.split([self.qk, self.qk, self.v, self.v], -1)
        q, k, v, out = (t.unflatten(-1, (self.heads, -1)) for t in (q, k, v, out))
        i, f = gates.split(self.heads, -1)
        if metadata is None:  # vLLM measures memory: as one prompt
            out.copy_(ops.mlstm(*(t[None] for t in (q, k, v, i, f)), **self.options)[0])
            return
        end = metadata.num_decode_tokens
        if end:
            assert metadata.slots_d is not None
            slots = metadata.slots_d[:end]
            h = ops.mlstm_step(
                q[:end], k[:end], v[:end], i[:end], f[:end], self.state, state_indices=slots, **self.options
            )
            out[:end].copy_(h)
        if metadata.num_prefills:
            assert metadata.slots_p is not None
            part = slice(end, end + metadata.num_prefill_tokens)
            q, k, v, i, f = (t[None, part] for t in (q, k, v, i, f))
            h = ops.mlstm_prefill(
                q, k, v, i, f, self.state, state_indices=metadata.slots_p, cu_seqlens=metadata.query_start_loc_p,
                fresh=metadata.fresh_p, **self.options,
            )  # fmt: skip
            out[part].copy_(h[0])

    def bind_kv_cache(self, kv_cache: Tensor) -> None:
        super().bind_kv_cache(kv_cache)
        c, n, m = self.kv_cache
        self.state = c, n, m[:, : self.heads]

    def get_state_shape(self) -> tuple[tuple[int, ...], ...]:
        return self._state_shape

    def get_state_dtype(self) -> tuple[torch.dtype, ...]:
        return self._c_dtype, torch.float32, torch.float32

    @property
    def mamba_type(self) -> MambaAttentionBackendEnum:
        return MambaAttentionBackendEnum[BACKEND]


@eager_break_during_capture
def _mlstm(z: Tensor, gates: Tensor, out: Tensor, layer_name: str) -> None:
    context = get_forward_context()
    context.no_compile_layers[layer_name].run(z, gates, out, metadata_of(context.attn_metadata, layer_name))


def _fake(z: Tensor, gates: Tensor, out: Tensor, layer_name: str) -> None:
    return None


direct_register_custom_op(OPERATOR.partition("::")[2], _mlstm, mutates_args=["out"], fake_impl=_fake)
