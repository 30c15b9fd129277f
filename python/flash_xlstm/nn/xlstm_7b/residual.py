"""The two halves of a block, ``x + f(norm(x))``, for training. Each is one autograd function.

The forward keeps what costs much to recompute: x, the joined projections, and the states, h and gated output of the
mLSTM. The kernels of the gradients also return the norms' outputs and SwiGLU's product. The residual is added in the
epilogue of the output product. The residual's gradient is added in the kernel of the norm's gradient. Projections are
parts of one joined tensor. Their gradients are written side by side, as the product of the joined gradient reads them.

Large products are in float8 where torchao's layers hold the weights (:mod:`flash_xlstm.nn.xlstm_7b.products`).

``again`` is gradient checkpointing. The forward then keeps only x and the mLSTM's h, s and m. The backward repeats the
norms and the products, except the products that write to the residual stream. It repeats no mLSTM.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import forward_ad

from flash_xlstm.nn.linear import gradients_are_looked_at, nothing_looks_on, own_parameters, torch_own, unchanged
from flash_xlstm.nn.packing import closed
from flash_xlstm.nn.xlstm_7b.feedforward import FeedForward
from flash_xlstm.nn.xlstm_7b.mlstm import mLSTMLayer
from flash_xlstm.nn.xlstm_7b.norm import MultiHeadLayerNorm, RMSNorm
from flash_xlstm.nn.xlstm_7b.products import (
    Float8,
    added_product,
    cast_gradient,
    input_gradient,
    joined,
    linear_kind,
    product,
    swiglu_gradient,
    swiglu_product,
    weight_gradient,
)
from flash_xlstm.ops import _common
from flash_xlstm.ops.mlstm_gated import mlstm_gated_backward
from flash_xlstm.ops.pointwise import rms_norm_backward

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_LINEAR_FORWARD = torch_own(nn.Linear.forward, nn.modules.linear)
_FORWARDS = (mLSTMLayer.forward, FeedForward.forward, RMSNorm.forward, MultiHeadLayerNorm.forward)
_LINEAR = torch._C._nn.linear
_operators = torch.ops.flash_xlstm


class Ranks(Protocol):
    """Ranks that each have some of a half's heads or features, and the same stream or each a part of it."""

    def gather(self, t: Tensor) -> Tensor:
        """The whole sequence of the ranks' t (batch, seq, dim)."""

    def reduce(self, t: Tensor) -> Tensor:
        """The sum of the ranks' t (batch, seq, dim), or this rank's part of its sequence."""


class MlstmHalf(NamedTuple):
    """What the mLSTM half needs of a block."""

    tensors: tuple[Tensor, ...]  # weights of norm, head norm, out_proj, projections and gates; the gates' biases
    counts: tuple[int, int]  # how many projections and gates there are
    sizes: tuple[int, int]  # heads, qk_dim
    # eps of norm, mLSTM, head norm; soft cap; chunk size; whether states are kept
    numbers: tuple[float, float, float, float | None, int, bool]
    ranks: Ranks | None = None
    float8: Float8 | None = None  # not with ranks


class FeedForwardHalf(NamedTuple):
    """What the feed-forward half needs of a block."""

    tensors: tuple[Tensor, ...]  # weights of norm, proj_down and projections
    eps: float
    ranks: Ranks | None = None
    float8: Float8 | None = None  # not with ranks


def serves(x: Tensor) -> bool:
    """Whether x and torch's global state allow the halves. Gradients must be on. There must be no autocast, no
    transform of torch.func, no replaced forward of :class:`~torch.nn.Linear` or of this package's layers, and
    :func:`~flash_xlstm.nn.linear.nothing_looks_on`."""
    return (
        torch.is_grad_enabled()
        and x.dtype in _DTYPES
        and (x.is_cpu or x.is_cuda)
        and x.dim() == 3
        and x.numel() > 0
        and nn.Linear.forward is _LINEAR_FORWARD
        and (mLSTMLayer.forward, FeedForward.forward, RMSNorm.forward, MultiHeadLayerNorm.forward) == _FORWARDS
        and F.linear is _LINEAR
        and not torch.is_autocast_enabled(x.device.type)
        and forward_ad._current_level < 0
        and (
            torch.compiler.is_compiling()
            or (type(x) is Tensor and nothing_looks_on() and not torch._C._are_functorch_transforms_active())
        )
    )


def mlstm_half(block: Any, x: Tensor) -> MlstmHalf | None:
    """What the half needs of `block`, or None where it does not serve. It does not serve hooks, other modules in place
    of a part, biases other than the gates', or weights that an op cannot read beside x."""
    part = block._modules.get
    layer = part("mlstm_layer")
    runs_here = unchanged(layer, mLSTMLayer) and layer.kernel == "flash" and layer.context_group is None
    if not runs_here or gradients_are_looked_at(layer):
        return None
    head_norm, norm, out = layer._modules.get("multihead_norm"), part("norm_mlstm"), layer._modules.get("out_proj")
    projections, gates = layer.projections("qkv_opreact"), layer.projections("ifgate_preact")
    kind, float8 = linear_kind(x, out, *projections)
    tensors = _weights(x, (norm, RMSNorm), (head_norm, MultiHeadLayerNorm), (out, kind))
    stacked = _weights(x, *((p, kind) for p in projections))
    gate_weights = [_parameters(x, gate, nn.Linear) for gate in gates]
    if tensors is None or stacked is None or any(own is None or own[1] is None for own in gate_weights):
        return None
    found: Any = gate_weights
    return MlstmHalf(
        (*tensors, *stacked, *(own[0] for own in found), *(own[1] for own in found)),
        (len(projections), len(gates)),
        (layer.num_heads, layer.qk_dim),
        (
            norm.eps,
            layer.eps,
            head_norm.eps,
            layer.gate_soft_cap,
            _common.chunk_size_or_0(layer.chunk_size),
            layer.keep_states,
        ),
        float8=float8,
    )


def feed_forward_half(block: Any, x: Tensor) -> FeedForwardHalf | None:
    """As :func:`mlstm_half`. No bias is served."""
    part = block._modules.get
    ffn, norm = part("ffn"), part("norm_ffn")
    if not unchanged(ffn, FeedForward) or gradients_are_looked_at(ffn):
        return None
    layers = ffn._modules.get("proj_down"), *ffn.projections("proj_up_gate_z")
    kind, float8 = linear_kind(x, *layers)
    tensors = _weights(x, (norm, RMSNorm), *((layer, kind) for layer in layers))
    return None if tensors is None else FeedForwardHalf(tensors, norm.eps, float8=float8)


def _weights(x: Tensor, *parts: tuple[Any, type[nn.Module]]) -> tuple[Tensor, ...] | None:
    """The weights of plain modules without biases. None if a module is of another kind."""
    found = []
    for part, kind in parts:
        own = _parameters(x, part, kind)
        if own is None or own[1] is not None:
            return None
        found.append(own[0])
    return tuple(found)


def _parameters(x: Tensor, part: Any, kind: type[nn.Module]) -> tuple[Tensor, Tensor | None] | None:
    """:func:`own_parameters`, if no hook looks at the gradients of `part`."""
    own = own_parameters(part, kind, x)
    return None if own is None or gradients_are_looked_at(part) else own


def run_mlstm(x: Tensor, half: MlstmHalf, padding: Tensor | None, cu_seqlens: Tensor | None, again: bool) -> Tensor:
    """``x + mlstm_layer(norm(x))``: (batch, seq, hidden_size)."""
    return _Mlstm.apply(
        x, padding, cu_seqlens, half.counts, half.sizes, half.numbers, again, half.ranks, half.float8, *half.tensors
    )  # fmt: skip


def run_feed_forward(x: Tensor, half: FeedForwardHalf, again: bool) -> Tensor:
    """``x + ffn(norm(x))``: (batch, seq, hidden_size)."""
    return _FeedForward.apply(x, half.eps, again, half.ranks, half.float8, *half.tensors)


def _gathered(t: Tensor, ranks: Ranks | None) -> Tensor:
    return t if ranks is None else ranks.gather(t)


def _reduced(t: Tensor, ranks: Ranks | None) -> Tensor:
    return t if ranks is None else ranks.reduce(t)


def _added(x: Tensor, rows: Tensor, weight: Tensor, ranks: Ranks | None, float8: Float8 | None) -> Tensor:
    """``x + rows @ weight.T``, of all ranks' rows and weights."""
    if ranks is None and float8 is None:  # within the product's epilogue
        return _shaped(added_product(_rows(x), rows, weight), x)
    return x + _reduced(product(rows, (weight,), float8).view(x.shape[0], -1, x.shape[2]), ranks)


def _parted(gradient: Tensor | None, weights: tuple[Tensor, ...]) -> tuple[Tensor | None, ...]:
    """The gradients of `weights`, which are parts of the joined gradient."""
    if gradient is None or len(weights) == 1:
        return (gradient,) * len(weights)
    return gradient.split([w.shape[0] for w in weights])


def _rows(t: Tensor) -> Tensor:
    """t (batch, seq, dim) as (batch * seq, dim). The vmap of ``is_grads_batched`` knows no flatten."""
    return t.reshape(-1, t.shape[-1])


def _shaped(rows: Tensor, x: Tensor) -> Tensor:
    """`rows` in the shape of x, which torch does not take for a view. A function's result that is a view refuses to be
    written in place, and FSDP warns of it."""
    return torch.ops.aten._unsafe_view.default(rows, x.shape)


def _as_the_forward(backward: Callable[..., Any]) -> Callable[..., Any]:
    """`backward` without autocast, which was not on in the forward: its products would be of another dtype."""

    @functools.wraps(backward)
    def run(ctx: Any, dout: Tensor) -> Any:
        if torch.compiler.is_compiling() or not torch._C._is_any_autocast_enabled():
            return backward(ctx, dout)
        with torch._C._DisableAutocast():
            return backward(ctx, dout)

    return run


class _Mlstm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, padding, cu_seqlens, counts, sizes, numbers, again, ranks, float8, *tensors):
        norm, head, out, *rest = tensors
        parts, gates, biases = _split(rest, counts)
        eps, mlstm_eps, head_eps, cap, chunk_size, keep_states = numbers
        normed = _gathered(_operators.rms_norm(x, norm, eps), ranks)
        z, pre = _projected(_rows(normed), parts, gates, biases, float8)
        z, i, f = _read(z, pre, padding, normed.shape, sizes)
        y, h, kept = _operators.mlstm_gated(
            z, i, f, head, cu_seqlens, *sizes, None, mlstm_eps, cap, chunk_size, head_eps, keep_states and not again
        )  # fmt: skip
        ctx.save_for_backward(
            x, padding, cu_seqlens, h, kept, *((None,) * 3 if again else (z, pre, y)), *tensors
        )  # fmt: skip
        ctx.counts, ctx.sizes, ctx.numbers, ctx.ranks, ctx.float8 = counts, sizes, numbers, ranks, float8
        return _added(x, _rows(y), out, ranks, float8)

    @staticmethod
    @_as_the_forward
    def backward(ctx, dout):
        x, padding, cu_seqlens, h, kept, z, pre, y, norm, head, out, *rest = ctx.saved_tensors
        parts, gates, biases = _split(rest, ctx.counts)
        eps, mlstm_eps, head_eps, cap, chunk_size, _ = ctx.numbers
        ranks, float8 = ctx.ranks, ctx.float8
        wants = ctx.needs_input_grad[9:]
        want_norm, want_head, want_out, *want_rest = wants
        want_parts, want_gates, want_biases = (any(each) for each in _split(want_rest, ctx.counts))
        normed = None
        if z is None:
            normed = _rows(_gathered(_operators.rms_norm(x, norm, eps), ranks))
            z, pre = _projected(normed, parts, gates, biases, float8)
        dout = dout.contiguous()
        whole = _gathered(dout, ranks)
        z, i, f = _read(z, pre, padding, whole.shape, ctx.sizes)
        if y is None:
            y = _operators.gated_head_norm(h, z[..., -out.shape[1] :], head, head_eps)
        given = cast_gradient(_rows(whole), want_out, float8)
        dy = input_gradient(given, (out,), float8).view(y.shape)
        d_out = weight_gradient(given, _rows(y), float8) if want_out else None
        del given
        # Products with rows of another length than a multiple of 16 bytes are slow: then the gates have their own. So
        # they have beside products in float8.
        beside = float8 is None and 2 * ctx.sizes[0] * z.element_size() % 16 == 0
        dz, di, df, d_head = mlstm_gated_backward(
            dy, z, i, f, head, cu_seqlens, h, kept, *ctx.sizes, None, mlstm_eps, cap, chunk_size, head_eps, want_head,
            beside,
        )  # fmt: skip
        del dy
        dz = _rows(dz)
        if beside:
            given, dpre, weights = dz, dz[:, z.shape[2] :], parts + gates
            dnormed = torch.mm(dz, joined(weights))
        else:
            given, dpre, weights = cast_gradient(dz, want_parts, float8), _rows(torch.cat((di, df), -1)), parts
            if float8 is None:  # the large product adds to the small
                dnormed = torch.mm(dpre, joined(gates)).addmm_(dz, joined(parts))
            else:
                dnormed = input_gradient(given, parts, float8).addmm_(dpre, joined(gates))
        dnormed = _reduced(dnormed.view(whole.shape), ranks)
        remake = normed is None and (want_parts or want_gates)
        dx, d_norm, made = rms_norm_backward(dnormed, dout, x, norm, eps, want_norm, remake)
        del dnormed
        normed = _rows(_gathered(made, ranks)) if remake else normed
        want_large = want_parts or (beside and want_gates)
        d_weights = _parted(weight_gradient(given, normed, float8) if want_large else None, weights)
        if not beside:
            d_weights += _parted(torch.mm(dpre.t(), normed) if want_gates else None, gates)
        d_biases = dpre.sum(0) if want_biases else None
        gradients = (
            d_norm if want_norm else None, d_head if want_head else None, d_out,
            *d_weights, *_parted(d_biases, biases),
        )  # fmt: skip
        gradients = tuple(g if want else None for g, want in zip(gradients, wants, strict=True))
        return dx, *(None,) * 8, *gradients


def _split(rest: Any, counts: tuple[int, int]) -> tuple[Any, Any, Any]:
    """Splits `rest` into what belongs to the projections, the gates and the gates' biases."""
    first, second = counts[0], counts[0] + counts[1]
    return tuple(rest[:first]), tuple(rest[first:second]), tuple(rest[second:])


def _projected(normed: Tensor, parts: Any, gates: Any, biases: Any, float8: Float8 | None) -> tuple[Tensor, Tensor]:
    """The joined projections and the joined gates of rows."""
    return product(normed, parts, float8), torch.addmm(joined(biases), normed, joined(gates).t())


def _read(z: Tensor, pre: Tensor, padding: Tensor | None, shape: Any, sizes: tuple[int, int]) -> Any:
    """z as (batch, seq, features), and i and f as (batch, seq, heads)."""
    i, f = pre.view(*shape[:2], -1).split(sizes[0], -1)
    return z.view(*shape[:2], -1), *closed(i, f, padding)


class _FeedForward(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, eps, again, ranks, float8, norm, down, *parts):
        normed = _rows(_gathered(_operators.rms_norm(x, norm, eps), ranks))
        z, gated = swiglu_product(normed, parts, float8)
        out = _added(x, gated, down, ranks, float8)
        ctx.eps, ctx.ranks, ctx.float8 = eps, ranks, float8
        ctx.save_for_backward(x, None if again else z, norm, down, *parts)
        return out

    @staticmethod
    @_as_the_forward
    def backward(ctx, dout):
        x, z, norm, down, *parts = ctx.saved_tensors
        ranks, float8 = ctx.ranks, ctx.float8
        want_norm, want_down, *want_parts = ctx.needs_input_grad[5:]
        normed = gated = None
        if z is None:
            normed = _rows(_gathered(_operators.rms_norm(x, norm, ctx.eps), ranks))
            z, gated = swiglu_product(normed, parts, float8, wanted=False)
        dout = dout.contiguous()
        whole = _gathered(dout, ranks)
        given = cast_gradient(_rows(whole), want_down, float8)
        dz, remade = swiglu_gradient(given, down, z, want_down and gated is None, float8)
        gated = remade if gated is None else gated
        d_down = weight_gradient(given, gated, float8) if want_down else None
        del gated, remade
        given = cast_gradient(dz, any(want_parts), float8)
        dnormed = _reduced(input_gradient(given, parts, float8).view(whole.shape), ranks)
        remake = normed is None and any(want_parts)
        dx, d_norm, made = rms_norm_backward(dnormed, dout, x, norm, ctx.eps, want_norm, remake)
        normed = _rows(_gathered(made, ranks)) if remake else normed
        d_parts = _parted(weight_gradient(given, normed, float8) if any(want_parts) else None, parts)
        d_parts = tuple(g if want else None for g, want in zip(d_parts, want_parts, strict=True))
        return dx, None, None, None, None, d_norm if want_norm else None, d_down, *d_parts
