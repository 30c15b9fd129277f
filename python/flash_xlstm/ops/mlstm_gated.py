"""The mLSTM of one joined projection, with the gated head-wise norm behind it. The layers of the 7B train with it."""

from __future__ import annotations

import torch

from flash_xlstm.ops import _common
from flash_xlstm.ops.mlstm import kept_shape


@_common.register_fake("mlstm_gated")
def _(
    z, i, f, weight, cu_seqlens, heads, qk_dim, scale, eps, gate_soft_cap, chunk_size, norm_eps, keep_states=False
):  # fmt: skip
    _common.no_mixed_meta(z, of="z", i=i, f=f, weight=weight, cu_seqlens=cu_seqlens)
    batch, seq, v_dim = z.shape[0], z.shape[1], z.shape[2] // 2 - qk_dim
    q, dv = z[..., :qk_dim].unflatten(-1, (heads, qk_dim // heads)), v_dim // heads
    kept = z.new_empty(kept_shape(q, dv, cu_seqlens, keep_states), dtype=torch.float32)
    return z.new_empty((batch, seq, v_dim)), z.new_empty((batch, seq, heads, dv)), kept


@_common.register_fake("mlstm_gated_backward")
def _(
    dy, z, i, f, weight, cu_seqlens, h, kept, heads, qk_dim, scale, eps, gate_soft_cap, chunk_size, norm_eps,
    weight_gradient, gates_beside,
):  # fmt: skip
    dweight = weight.new_empty(weight.shape if weight_gradient else 0)
    dz = z.new_empty((*z.shape[:2], z.shape[2] + (2 * heads if gates_beside else 0)))
    di, df = (t.new_empty(0 if gates_beside else t.shape) for t in (i, f))
    return dz, di, df, dweight


def _setup_context(ctx, inputs, output) -> None:
    z, i, f, weight, cu_seqlens, *ctx.options = inputs[:12]
    _, h, kept = output
    ctx.mark_non_differentiable(h, kept)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(z, i, f, weight, cu_seqlens, h, kept)


def _backward(ctx, dy, _dh, _dkept):
    z, i, f, weight, cu_seqlens, h, kept = ctx.saved_tensors
    wanted = ctx.needs_input_grad[3]
    dz, di, df, dweight = mlstm_gated_backward(dy, z, i, f, weight, cu_seqlens, h, kept, *ctx.options, wanted, False)
    return dz, di, df, dweight if wanted else None, *[None] * 9


# (z, i, f, weight, cu_seqlens, heads, qk_dim, scale, eps, gate_soft_cap, chunk_size, norm_eps, keep_states=False)
# -> (y, h, kept)
# z (batch, seq, 2 * qk_dim + 2 * v_dim) holds q, k, v and the output gate side by side. y (batch, seq, v_dim) is
# gated_head_norm(mlstm(q, k, v, i, f), gate, weight). h and kept are for the backward. Differentiable through y, once.
mlstm_gated = _common.differentiable("mlstm_gated", _setup_context, _backward)
mlstm_gated_backward = _common.no_double_backward("mlstm_gated_backward")
