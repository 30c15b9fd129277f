"""A block of the xLSTM 7B on one token, in one call: on a CPU calls are much of a small model's token, on CUDA kernels
that follow each other closely and fuse what is between them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

import flash_xlstm.ops  # noqa: F401  (registers the operator)
from flash_xlstm.nn.feedforward import FeedForward
from flash_xlstm.nn.linear import few_rows
from flash_xlstm.nn.mlstm import State, mLSTMLayer
from flash_xlstm.nn.norm import MultiHeadLayerNorm, RMSNorm

_KNOWN = (nn.Linear, RMSNorm, MultiHeadLayerNorm, mLSTMLayer, FeedForward)


def block_step(block: Any, x: Tensor, state: State, state_indices: Tensor | None) -> Tensor | None:
    """What `block`, an mLSTMBlock, makes of one token of each row; `state` is updated in place.

    None, with nothing done, where the operator does not serve: it is for few rows without gradients (on CUDA in
    bfloat16), and does not know of hooks, other modules in a part's place, biases but the gates', or weights elsewhere.
    """
    layer, ffn, (c, n, _) = block.mlstm_layer, block.ffn, state
    if not (
        x.shape[1] == 1
        and few_rows(x)
        and c.dtype in (torch.float32, torch.bfloat16)
        and n.dtype == torch.float32
        and all(t.is_contiguous() for t in state)
        and _plain((layer, ffn), x)
        and layer.step_kernel == "flash"
    ):
        return None
    rest = (block.norm_mlstm, layer.multihead_norm, layer.out_proj, block.norm_ffn, ffn.proj_down)
    qkvo, up = layer.projections("qkv_opreact"), ffn.projections("proj_up_gate_z")
    gates = layer.projections("ifgate_preact")
    if not (_plain((*rest, *qkvo, *up), x) and _plain(gates, x, biases=True)):
        return None
    if x.is_cuda and not (
        _fits_cuda((*rest, *qkvo, *up, *gates)) and c.shape[2] <= 8192 and max(c.shape[3], x.shape[2]) <= 16384
    ):
        return None
    norm, head_norm, out_proj, ffn_norm, down = _parameters("weight", rest)
    return torch.ops.flash_xlstm.mlstm_block_step.default(
        x, *state, state_indices, norm,
        _parameters("weight", qkvo), _parameters("weight", gates), _parameters("bias", gates),
        head_norm, out_proj, ffn_norm, _parameters("weight", up), down,
        block.norm_mlstm.eps, layer.eps, layer.multihead_norm.eps, block.norm_ffn.eps, layer.gate_soft_cap,
    )  # fmt: skip


# Through _parameters: a module's attributes take ten times as long to look up.
def _parameters(name: str, parts: Iterable[nn.Module]) -> list[Tensor]:
    return [part._parameters[name] for part in parts]  # type: ignore[misc]


def _plain(parts: Iterable[nn.Module], x: Tensor, *, biases: bool = False) -> bool:
    dtype, device = x.dtype, x.device
    for part in parts:
        if type(part) not in _KNOWN or part._forward_hooks or part._forward_pre_hooks or "forward" in vars(part):
            return False
        if "bias" in part._parameters and (part._parameters["bias"] is None) == biases:
            return False
        for p in part._parameters.values():
            if p is not None and not (type(p) is nn.Parameter and p.dtype == dtype and p.device == device):
                return False
    return True


def _fits_cuda(parts: Iterable[nn.Module]) -> bool:
    """Whether every row of every weight begins at a multiple of 16 bytes."""
    weights = _parameters("weight", parts)
    return all(t.shape[-1] % 8 == 0 and t.data_ptr() % 16 == 0 for t in weights)


@torch.library.register_fake("flash_xlstm::mlstm_block_step")
def _(x: Tensor, *args: Any) -> Tensor:
    return x.new_empty(x.shape)
