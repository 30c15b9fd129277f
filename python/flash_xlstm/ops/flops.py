"""How many operations the ops' products take, for :class:`torch.utils.flop_counter.FlopCounterMode`.

docs/math.md has the formulas. A multiply-add is two operations, as torch counts. Pointwise work does not count, and
nothing counts twice that a kernel computes again.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch.utils.flop_counter import register_flop_formula

import flash_xlstm.ops.loss  # noqa: F401  (its operators are defined in Python)

MLSTM_CHUNK = 128  # tokens; the count does not depend on how a kernel divides the sequence

_operators = torch.ops.flash_xlstm
_Shape = Any  # of a tensor


def mlstm_flops(batch: int, seq: int, heads: int, dqk: int, dv: int, *, backward: bool = False) -> int:
    """Operations of the mLSTM's forward, or of its backward, in chunks of 128 tokens."""
    chunk, state = min(seq, MLSTM_CHUNK), dqk * dv
    if backward:  # q k^T again, dh v^T, dw k, dw^T q, w^T dh; dq, dk, dv beyond the chunk, q^T dh
        token = chunk * (3 * dqk + 2 * dv) + 4 * state
    else:  # q k^T, w v; q c, k^T v
        token = chunk * (dqk + dv) + 2 * state
    return 2 * batch * seq * heads * token


def _mlstm(q: _Shape, v: _Shape, backward: bool) -> int:
    batch, seq, heads, dqk = q
    return mlstm_flops(batch, seq, heads, dqk, v[3], backward=backward)


@register_flop_formula([
    _operators.mlstm, _operators.mlstm_forward, _operators.mlstm_h, _operators.mlstm_prefill, _operators.mlstm_sig,
])  # fmt: skip
def _(q: _Shape, k: _Shape, v: _Shape, *args: Any, **kwargs: Any) -> int:
    return _mlstm(q, v, False)


@register_flop_formula(_operators.mlstm_backward)
def _(dh, dc_last, dn_last, dm_last, q: _Shape, k: _Shape, v: _Shape, *args: Any, **kwargs: Any) -> int:
    return _mlstm(q, v, True)


@register_flop_formula(_operators.mlstm_sig_backward)
def _(dh, dc_last, dn_last, q: _Shape, k: _Shape, v: _Shape, *args: Any, **kwargs: Any) -> int:
    return _mlstm(q, v, True)


# The next two are parts of one backward.
@register_flop_formula(_operators.mlstm_initial_backward)
def _(dh, dc_last, dn_last, q: _Shape, k: _Shape, v: _Shape, *args: Any, **kwargs: Any) -> int:
    return 2 * math.prod(q) * v[3]  # q^T dh


@register_flop_formula(_operators.mlstm_remaining_backward)
def _(dh, dc_last, dn_last, dm_last, q: _Shape, k: _Shape, v: _Shape, *args: Any, **kwargs: Any) -> int:
    return _mlstm(q, v, True) - 2 * math.prod(q) * v[3]


def _gated(z: _Shape, heads: int, qk_dim: int, backward: bool) -> int:
    v_dim = z[2] // 2 - qk_dim
    return mlstm_flops(z[0], z[1], heads, qk_dim // heads, v_dim // heads, backward=backward)


@register_flop_formula(_operators.mlstm_gated)
def _(z: _Shape, i, f, weight, cu_seqlens, heads: int, qk_dim: int, *args: Any, **kwargs: Any) -> int:
    return _gated(z, heads, qk_dim, False)


@register_flop_formula(_operators.mlstm_gated_backward)
def _(
    dy, z: _Shape, i, f, weight, cu_seqlens, h, kept, heads: int, qk_dim: int, *args: Any, **kwargs: Any
) -> int:  # fmt: skip
    return _gated(z, heads, qk_dim, True)


@register_flop_formula([_operators.mlstm_state, _operators.mlstm_piece])
def _(k: _Shape, v: _Shape, *args: Any, **kwargs: Any) -> int:
    return 2 * math.prod(k) * v[3]  # k^T v


@register_flop_formula(_operators.mlstm_state_backward)
def _(dc, dn, dm, dlog_decay, k: _Shape, v: _Shape, *args: Any, **kwargs: Any) -> int:
    return 4 * math.prod(k) * v[3]  # dc v, dc^T k


@register_flop_formula(_operators.mlstm_step)
def _(q: _Shape, k: _Shape, v: _Shape, *args: Any, **kwargs: Any) -> int:
    return _step(q, v[2])


def _step(q: _Shape, dv: int) -> int:
    return 4 * math.prod(q) * dv  # k v^T, q c


@register_flop_formula(_operators.mlstm_block_step)
def _(
    x: _Shape, c: _Shape, n, m, state_indices, norm, qkvo, gates, gate_biases, head_norm, out_proj: _Shape, norm_ffn,
    up, down: _Shape, *args: Any, **kwargs: Any,
) -> int:  # fmt: skip
    weights = [*qkvo, *gates, out_proj, *up, down]
    return _rows(x, *weights) + _step((x[0], *c[1:3]), c[3])


@register_flop_formula([_operators.slstm, _operators.slstm_forward])
def _(x: _Shape, R: _Shape, *args: Any, **kwargs: Any) -> int:
    return 2 * math.prod(x[:2]) * math.prod(R)


@register_flop_formula(_operators.slstm_backward)
def _(dh, dh_last, dc_last, dn_last, dm_last, R: _Shape, *args: Any, out_shape: Any = None, **kwargs: Any) -> int:
    dx = out_shape[0]
    return 4 * math.prod(dx[:2]) * math.prod(R)  # R^T dx, dx h^T


@register_flop_formula(_operators.slstm_fresh_backward)
def _(dh: _Shape, R: _Shape, *args: Any, **kwargs: Any) -> int:
    return 4 * math.prod(dh[:2]) * math.prod(R)


@register_flop_formula(_operators.slstm_step)
def _(x: _Shape, R: _Shape, *args: Any, **kwargs: Any) -> int:
    return 2 * x[0] * math.prod(R)


@register_flop_formula([_operators.causal_conv1d, _operators.causal_conv1d_step])
def _(x: _Shape, weight: _Shape, *args: Any, **kwargs: Any) -> int:
    return 2 * math.prod(x) * weight[1]


@register_flop_formula(_operators.causal_conv1d_backward)
def _(dy, dlast, x: _Shape, weight: _Shape, *args: Any, **kwargs: Any) -> int:
    return 4 * math.prod(x) * weight[1]


def _rows(x: _Shape, *weights: _Shape) -> int:
    return 2 * math.prod(x[:-1]) * sum(map(math.prod, weights))


@register_flop_formula(_operators.linear_rows)
def _(x: _Shape, weight: _Shape, *args: Any, **kwargs: Any) -> int:
    return _rows(x, weight)


@register_flop_formula([_operators.fused_linear_rows, _operators.joined_product])
def _(x: _Shape, weights: list[_Shape], *args: Any, **kwargs: Any) -> int:
    return _rows(x, *weights)


@register_flop_formula(_operators.added_product)
def _(a: _Shape, weight: _Shape, *args: Any, **kwargs: Any) -> int:
    return _rows(a, weight)


@register_flop_formula(_operators.swiglu_product)
def _(a: _Shape, left: _Shape, right: _Shape, *args: Any, **kwargs: Any) -> int:
    return _rows(a, left, right)


@register_flop_formula(_operators.swiglu_product_backward)
def _(dout: _Shape, weight: _Shape, *args: Any, **kwargs: Any) -> int:
    return _rows(dout, weight)


@register_flop_formula(_operators.float_products)
def _(a: _Shape, bs: list[_Shape], *args: Any, **kwargs: Any) -> int:
    return 2 * a[0] * sum(map(math.prod, bs))


@register_flop_formula(_operators.linear_cross_entropy)
def _(hidden: _Shape, weight: _Shape, labels, *options_and_flags: Any, **kwargs: Any) -> int:
    return _rows(hidden, weight) * (1 + sum(options_and_flags[-2:]))  # the gradients that it makes along


@register_flop_formula(_operators.linear_cross_entropies_backward)
def _(dloss, hidden: _Shape, weight: _Shape, labels, *options_and_flags: Any, **kwargs: Any) -> int:
    return _rows(hidden, weight) * (1 + sum(options_and_flags[-2:]))
