"""The metadata of a step: which rows decode, which read prompts, and where their states are."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor
from vllm.v1.attention.backend import AttentionBackend
from vllm.v1.attention.backends.mamba_attn import BaseMambaAttentionMetadata, BaseMambaAttentionMetadataBuilder
from vllm.v1.attention.backends.utils import NULL_BLOCK_ID


class xLSTMBackend(AttentionBackend):
    """Not attention: vLLM's name for what prepares a layer's metadata."""

    @staticmethod
    def get_name() -> str:
        return "FLASH_XLSTM"

    @staticmethod
    def get_builder_cls() -> type[xLSTMMetadataBuilder]:
        return xLSTMMetadataBuilder

    @classmethod
    def is_ssm(cls) -> bool:
        return True


@dataclass
class xLSTMMetadata(BaseMambaAttentionMetadata):
    """Rows that decode come first, then those that read a prompt. All tensors are on the device.

    Attributes:
        slots_d: (rows,) int32, the states of the rows that decode; -1 for padding. None without such rows.
        slots_p: (num_prefills,) int32, the states of the rows that read a prompt. None without such rows.
        fresh_p: (num_prefills,) bool, rows whose prompt begins here. Their blocks hold old states, which are not read.
    """

    slots_d: Tensor | None = None
    slots_p: Tensor | None = None
    fresh_p: Tensor | None = None


class xLSTMMetadataBuilder(BaseMambaAttentionMetadataBuilder[xLSTMMetadata]):
    """As vLLM's builder for Mamba, which tells the first token of a prompt from a decoded one. vLLM pads batches with
    rows of block 0; here these become -1, which the kernels leave out."""

    metadata_cls = xLSTMMetadata
    needs_causal_conv1d_metadata = False

    def _update_metadata_for_cudagraph_capture(self, metadata: xLSTMMetadata) -> xLSTMMetadata:
        metadata = super()._update_metadata_for_cudagraph_capture(metadata)
        blocks, slots_d, slots_p, fresh_p = metadata.state_indices_tensor_d, None, None, None
        if blocks is not None and metadata.num_decodes:
            captured = blocks.data_ptr() == self.state_indices_tensor_d.data_ptr()
            slots_d = _slots(blocks[:, 0], in_place=captured)  # a graph reads this buffer
        if metadata.num_prefills:
            assert metadata.state_indices_tensor_p is not None and metadata.has_initial_states_p is not None
            slots_p = _slots(metadata.state_indices_tensor_p)
            fresh_p = ~metadata.has_initial_states_p
        return replace(metadata, slots_d=slots_d, slots_p=slots_p, fresh_p=fresh_p)


def _slots(blocks: Tensor, *, in_place: bool = False) -> Tensor:
    """(rows,) int32 block numbers with -1 in place of vLLM's null block."""
    is_null = blocks == NULL_BLOCK_ID
    return blocks.masked_fill_(is_null, -1) if in_place else blocks.masked_fill(is_null, -1).contiguous()


def metadata_of(attn_metadata: Any, layer_name: str) -> xLSTMMetadata | None:
    """A layer's metadata in a forward pass; None in a profile run."""
    return None if attn_metadata is None else attn_metadata.get(layer_name)
