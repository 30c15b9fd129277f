"""A block of the xLSTM 7B on one token, in one call of an operator.

On a CPU, Python calls are a large part of a small model's time per token. On CUDA the operator's kernels follow each
other closely and fuse what is between them.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from flash_xlstm._build import LIMITS
from flash_xlstm.nn.linear import are_weights_at_rest, few_rows, own_parameters, unchanged
from flash_xlstm.nn.state import State, has_slots
from flash_xlstm.nn.xlstm_7b.feedforward import FeedForward
from flash_xlstm.nn.xlstm_7b.mlstm import mLSTMLayer
from flash_xlstm.nn.xlstm_7b.norm import MultiHeadLayerNorm, RMSNorm
from flash_xlstm.ops import _common

_MAX_DQK, _MAX_DIM = LIMITS["mlstm_step_cuda_max_dqk"], LIMITS["norm_cuda_max_dim"]
_IN_MULTIPLE, _ALIGNMENT = LIMITS["linear_cuda_in_multiple"], LIMITS["linear_cuda_alignment"]
_FORWARDS = (mLSTMLayer.forward, FeedForward.forward, RMSNorm.forward, MultiHeadLayerNorm.forward)


def block_step(block: Any, x: Tensor, state: State, state_indices: Tensor | None) -> Tensor | None:
    """The output of `block`, an mLSTMBlock, for one token of each row. `state` is updated in place.

    Returns None, with nothing done, where the operator does not serve. It serves few rows without gradients, on CUDA in
    bfloat16. It does not serve hooks, other modules or forwards in place of a part, biases other than the gates', or
    weights that it cannot read beside x.
    """
    c, n, m = state
    if not (
        few_rows(x)
        and x.dim() == 3
        and x.shape[1] == 1
        and x.shape[0] > 0
        and c.dtype in (torch.float32, torch.bfloat16)
        and n.dtype == m.dtype == torch.float32
        and (c.is_contiguous() or has_slots(c))
        and (n.is_contiguous() or has_slots(n))
        and (m.is_contiguous() or has_slots(m))
        and (mLSTMLayer.forward, FeedForward.forward, RMSNorm.forward, MultiHeadLayerNorm.forward) == _FORWARDS
    ):
        return None
    part = block._modules.get  # a module's attributes take ten times as long
    norm, layer, ffn_norm, ffn = part("norm_mlstm"), part("mlstm_layer"), part("norm_ffn"), part("ffn")
    if not (unchanged(layer, mLSTMLayer) and unchanged(ffn, FeedForward) and layer.step_kernel == "flash"):
        return None
    if layer.context_group is not None:
        return None
    head_norm = layer._modules.get("multihead_norm")
    last = layer._modules.get("out_proj"), ffn._modules.get("proj_down")
    if not (
        (norms := _parameters((norm, ffn_norm), RMSNorm, x))
        and (head := _parameters((head_norm,), MultiHeadLayerNorm, x))
        and (qkvo := _parameters(layer.projections("qkv_opreact"), nn.Linear, x))
        and (gates := _parameters(layer.projections("ifgate_preact"), nn.Linear, x, biases=True))
        and (up := _parameters(ffn.projections("proj_up_gate_z"), nn.Linear, x))
        and (down := _parameters(last, nn.Linear, x))
    ):
        return None
    weights = [w for w, _ in (norms, head, qkvo, gates, up, down)]
    if x.is_cuda and not (
        all(map(_fits_cuda, weights)) and c.shape[2] <= _MAX_DQK and max(c.shape[3], x.shape[2]) <= _MAX_DIM
    ):
        return None
    (norm_weight, ffn_norm_weight), (head_weight,), qkvo_weights, gate_weights, up_weights, (out, down_weight) = weights
    return _mlstm_block_step(
        x, c, n, m, state_indices, norm_weight, qkvo_weights, gate_weights, gates[1], head_weight, out,
        ffn_norm_weight, up_weights, down_weight,
        norm.eps, layer.eps, head_norm.eps, ffn_norm.eps, layer.gate_soft_cap, are_weights_at_rest(),
    )  # fmt: skip


def _parameters(
    parts: Iterable[nn.Module | None], kind: type[nn.Module], x: Tensor, *, biases: bool = False
) -> tuple[list[Tensor], list[Tensor]] | None:
    """The weights and biases of `parts`. With `biases` every part must have a bias, without it no part may. None where
    that is not so, or where the operator cannot read a parameter."""
    weights, found = [], []
    for part in parts:
        own = own_parameters(part, kind, x)
        if own is None or (own[1] is None) == biases:
            return None
        weights.append(own[0])
        found.append(own[1])
    return weights, found


def _fits_cuda(weights: list[Tensor]) -> bool:
    """Whether the rows of all weights have the length and alignment that linear_rows needs on CUDA."""
    return all(t.shape[-1] % _IN_MULTIPLE == 0 and t.data_ptr() % _ALIGNMENT == 0 for t in weights)


@_common.register_fake("mlstm_block_step")
def _(x: Tensor, *args: Any) -> Tensor:
    return x.new_empty(x.shape)


_mlstm_block_step = _common.writing("mlstm_block_step", 1, 2, 3)
