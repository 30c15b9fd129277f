"""Plain PyTorch forms of the causal depthwise convolution."""

from __future__ import annotations

import itertools

import torch
import torch.nn.functional as F
from torch import Tensor

from flash_xlstm.reference import _common


def _sequence(x: Tensor, weight: Tensor, bias: Tensor | None, state: Tensor) -> tuple[Tensor, Tensor]:
    """Convolves x (rows, seq, channels) after the earlier inputs, state (rows, kernel - 1, channels)."""
    kernel = weight.shape[1]
    whole = torch.cat([state, x], 1)
    # F.conv1d with as many groups as channels takes seconds for its gradients.
    y = sum(whole[:, k : k + x.shape[1]] * weight[:, k] for k in range(kernel))
    y = y if bias is None else y + bias
    return y, whole[:, whole.shape[1] - (kernel - 1) :]


def causal_conv1d(
    x, weight, bias=None, *, activation=None, initial_state=None, cu_seqlens=None, return_final_state=False
) -> Tensor | tuple[Tensor, Tensor]:
    """Arguments and results are as in :func:`flash_xlstm.ops.causal_conv1d`, with any float dtype. It computes in
    float32 (float64 for float64) and rounds once."""
    wide = _common.wide(x.dtype)
    rows = x.shape[0] if cu_seqlens is None else cu_seqlens.numel() - 1
    kernel = weight.shape[1]
    shape = (rows, kernel - 1, x.shape[2])
    state = x.new_zeros(shape, dtype=wide) if initial_state is None else initial_state.to(wide)
    wide_x, wide_weight, wide_bias = x.to(wide), weight.to(wide), None if bias is None else bias.to(wide)
    offsets = None if cu_seqlens is None else cu_seqlens.tolist()
    if offsets is None:
        y, last = _sequence(wide_x, wide_weight, wide_bias, state)
    else:
        parts = [
            _sequence(wide_x[:, start:stop], wide_weight, wide_bias, state[s : s + 1])
            if stop > start
            else (wide_x[:, :0], state[s : s + 1])
            for s, (start, stop) in enumerate(itertools.pairwise(offsets))
        ]
        y, last = torch.cat([part[0] for part in parts], 1), torch.cat([part[1] for part in parts])
    y = (F.silu(y) if activation == "silu" else y).to(x.dtype)
    return (y, last.to(x.dtype)) if return_final_state else y


def causal_conv1d_step(x, weight, bias, state, *, activation=None) -> Tensor:
    """Reads one token, x (batch, channels). Updates `state` in place, as :func:`flash_xlstm.ops.causal_conv1d_step`."""
    options = {"activation": activation, "initial_state": state, "return_final_state": True}
    y, last = causal_conv1d(x[:, None], weight, bias, **options)
    state.copy_(last)
    return y[:, 0]
