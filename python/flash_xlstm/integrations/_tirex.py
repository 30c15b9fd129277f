"""TiRex-2's and TiRex's layers as a whole, from projections to norm: the forwards that `accelerate` gives them.

Nothing is copied or transposed between a layer's products and its op: products are written where the op reads them.
Soft caps, norm and output gate of the mLSTM are parts of ops. A call that has anything else to run, a hook or another
class of layer for example, takes the layer's own forward (:func:`_parameters`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.autograd.function import once_differentiable

from flash_xlstm import ops
from flash_xlstm.integrations.flashrnn import kernel_dtype_of
from flash_xlstm.nn.block_stack.slstm import _weights_of_op
from flash_xlstm.nn.linear import (
    _FORWARD,
    _LINEAR,
    gradients_are_looked_at,
    nothing_looks_on,
    own_parameters,
    unchanged,
)
from flash_xlstm.ops._common import needs_gradients
from flash_xlstm.ops.linear import mm
from flash_xlstm.ops.mlstm_gated import mlstm_gated, mlstm_gated_backward

SLSTM = "tirex2.model.component.flashrnn_slstm.sLSTMFlashRNNLayer"
MLSTM = "tirex2.model.component.mlstm_block.mLSTMLayer"
TIREX_SLSTM = "tirex.models.slstm.layer.sLSTMLayer"
_HEADWISE = "tirex2.model.component.flashrnn_slstm.LinearHeadwiseExpand"
_NORM = "tirex2.model.component.norm.MultiHeadLayerNorm"
_TIREX_HEADWISE, _TIREX_NORM = (
    f"tirex.models.slstm.layer.{name}" for name in ("LinearHeadwiseExpand", "MultiHeadLayerNorm")
)
_PROJECTION = "torch.nn.modules.linear.Linear"
_GATES = ("fgate", "igate", "zgate", "ogate")  # in the order of the op's i, f, z, o
_PROJECTIONS = ("q", "k", "v", "ogate_preact", "igate_preact", "fgate_preact", "out_proj")
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)

# Without gradients a CPU takes the rows of a batch in pieces of at least so many tokens. A piece's arrays stay in the
# cache, and the allocator gives the same memory to each piece. Larger arrays it maps anew, which zeroes page by page.
_TOKENS = 2048
_SLSTM_ROWS = 32  # a token of all rows reads R once


class Slstm:
    """TiRex-2's ``sLSTMFlashRNNLayer``."""

    def forward(self: Any, x: Tensor, **kwargs: Any) -> Tensor:
        """x (batch, seq, width). Neither this nor the original reads `kwargs`."""
        found = _parameters(self, x, dict.fromkeys(_GATES, _HEADWISE) | {"group_norm": _NORM})
        if found is None or not _is_plain_slstm(self, x, found):
            return type(self).forward(self, x, **kwargs)
        *gates, weight = found
        R, b = self.get_R().permute(2, 0, 3, 1), self.get_bias().transpose(0, 1)
        dtype = kernel_dtype_of(self.config, x.dtype)
        dropout = self.dropout if self.dropout.p and self.dropout.training else None
        return _slstm(x, gates, R, b, weight, self.group_norm.eps, dtype, dtype, dropout)


class TirexSlstm:
    """TiRex's ``sLSTMLayer``."""

    def forward(self: Any, x: Tensor, slstm_state: Tensor | None = None) -> Tensor:
        """x (batch, seq, width). The norm's factor is ``1 + weight``. As in the original, the recurrence reads its
        input in bfloat16."""
        found = _parameters(self, x, dict.fromkeys(_GATES, _TIREX_HEADWISE) | {"group_norm": _TIREX_NORM})
        if found is None or slstm_state is not None or not _is_plain_tirex(self, x, found):
            return type(self).forward(self, x, slstm_state)
        *gates, weight = found
        heads, dim = self.config.num_heads, self.config.head_dim
        R, b = _weights_of_op("cuda", self.slstm_cell._recurrent_kernel_, self.slstm_cell._bias_, heads, dim)
        return _slstm(x, gates, R, b, 1.0 + weight, 1e-5, torch.bfloat16, x.dtype)


def _slstm(
    x: Tensor,
    gates: list[Tensor],
    R: Tensor,
    b: Tensor,
    weight: Tensor,
    eps: float,
    op_dtype: torch.dtype,
    dtype: torch.dtype,
    dropout: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:
    """The norm of the sLSTM's output, whose op reads in `op_dtype`, in `dtype`."""
    R, b = (t if t.dtype in (op_dtype, torch.float32) else t.float() for t in (R, b))

    def normed(gates: Tensor) -> Tensor:
        h: Any = ops.slstm(gates.to(op_dtype), R, b)
        h = h.to(dtype) if dropout is None else dropout(h.to(dtype))
        return F.layer_norm(h, h.shape[-1:], eps=eps).flatten(2)

    if needs_gradients((x, *gates, R, b, weight)):
        return normed(_GateProducts.apply(x, *gates)) * weight
    out = x.new_empty(x.shape, dtype=torch.promote_types(dtype, weight.dtype))
    for piece, to in _pieces(x, out, _SLSTM_ROWS):
        torch.mul(normed(_gate_products(piece, gates)), weight, out=to)
    return out


class Mlstm:
    """TiRex-2's ``mLSTMLayer``."""

    def forward(self: Any, x: Tensor) -> Tensor:
        """x (batch, seq, width)."""
        kinds = dict.fromkeys(_PROJECTIONS, _PROJECTION) | {"multihead_norm": _NORM}
        found = _parameters(self, x, kinds, biases=("igate_preact", "fgate_preact"))
        if found is None or not _is_plain_mlstm(self, found):
            return type(self).forward(self, x)
        q, k, v, o, i, i_bias, f, f_bias, out_proj, weight = found
        heads, cap = self.config.num_heads, self.config.gate_soft_cap
        eps, norm_eps = self.mlstm_backend.config.eps, self.multihead_norm.eps
        options = heads, q.shape[0], None, eps, cap, 0, norm_eps  # of mlstm_gated
        if needs_gradients((x, *found)):
            return _MlstmCell.apply(x, options, q, k, v, o, i, i_bias, f, f_bias, weight, out_proj)
        gates, bias = torch.cat([i, f]), torch.cat([i_bias, f_bias])
        if not x.is_cpu:
            heads_of = (F.linear(x, t).unflatten(-1, (heads, -1)) for t in (q, k, v))
            h = ops.mlstm(*heads_of, *F.linear(x, gates, bias).chunk(2, -1), eps=eps, gate_soft_cap=cap)
            return F.linear(ops.gated_head_norm(h, F.linear(x, o), weight, norm_eps), out_proj)
        out = torch.empty_like(x, memory_format=torch.contiguous_format)
        for piece, to in _pieces(x, out, 1):
            y, *_ = _gated(piece, options, (q, k, v, o), gates, bias, weight, False)
            mm(y.flatten(0, 1), [out_proj.t()], [to.flatten(0, 1)])
        return out


def _parameters(layer: Any, x: Tensor, parts: dict[str, str], biases: tuple[str, ...] = ()) -> list[Tensor] | None:
    """The weights of the submodules `parts`, whose classes are given by name, each of `biases` with its bias. None if
    a call of `layer` may run more than products with them: another class, a hook, a parametrization, autocast, a
    compiler, a transform, a mode; or where other parts have a bias."""
    if (
        torch.compiler.is_compiling()
        or type(x) is not Tensor
        or x.dim() != 3
        or x.numel() == 0
        or not (x.is_cpu or x.is_cuda)
        or x.dtype not in _DTYPES
        or (torch._C._is_any_autocast_enabled() and torch.is_autocast_enabled(x.device.type))
        or torch._C._are_functorch_transforms_active()
        or forward_ad._current_level >= 0
        or nn.Linear.forward is not _FORWARD
        or F.linear is not _LINEAR
        or not nothing_looks_on()
    ):
        return None
    modules = layer._modules
    if gradients_are_looked_at(*(m for m in modules.values() if m is not None)):
        return None
    found: list[Any] = []
    for name, wanted in parts.items():
        part = modules.get(name)
        own = own_parameters(part, type(part), x) if _is(part, wanted) else None
        if own is None or (own[1] is not None) != (name in biases):
            return None
        found += own if name in biases else own[:1]
    return found


def _is(module: Any, kind: str) -> bool:
    return f"{type(module).__module__}.{type(module).__qualname__}" == kind


def _is_plain_slstm(layer: Any, x: Tensor, found: list[Tensor]) -> bool:
    own = vars(layer)
    return (
        _is_ours(own.get("slstm_flashrnn"))
        and own.keys().isdisjoint(("recurrence", "get_R", "get_bias"))
        and _are_gates(found, x, layer.config)
        and unchanged(layer.dropout, nn.Dropout)
    )


def _is_plain_tirex(layer: Any, x: Tensor, found: list[Tensor]) -> bool:
    return _holds_our_op(layer._modules.get("slstm_cell")) and _are_gates(found, x, layer.config)


def _are_gates(found: list[Tensor], x: Tensor, config: Any) -> bool:
    """Whether the weights of four gates and a norm are those of a layer from the width of x to the same."""
    heads, dim = config.num_heads, config.head_dim
    *gates, norm = (tuple(t.shape) for t in found)
    return gates == [(heads, dim, dim)] * 4 and norm == (heads * dim,) == tuple(x.shape[2:])


def _is_plain_mlstm(layer: Any, found: list[Tensor]) -> bool:
    backend = layer._modules.get("mlstm_backend")
    return (
        _holds_our_op(backend)
        and "train" in backend.config.mode
        and not backend.config.return_last_states
        and "siging" not in backend.config.chunkwise_kernel
        and unchanged(layer.ogate_act_fn, nn.Sigmoid)
        and found[-1].shape == (layer.v_dim,)
    )


def _holds_our_op(module: Any) -> bool:
    """Whether a call of `module` runs the op that `accelerate` put there, and nothing else."""
    own: dict[str, Any] = {} if module is None else vars(module)
    return _is_ours(own.get("forward")) and not (
        own["_forward_hooks"] or own["_forward_pre_hooks"] or own.get("_compiled_call_impl")
    )


def _is_ours(function: Any) -> bool:
    return getattr(function, "__module__", "").startswith("flash_xlstm.integrations.")


def _pieces(x: Tensor, out: Tensor, least_rows: int) -> list[tuple[Tensor, Tensor]]:
    """x and `out` in pieces of their rows, of about one size."""
    batch, seq = x.shape[:2]
    each = max(least_rows, -(-_TOKENS // seq))
    if not x.is_cpu or batch <= each:
        return [(x, out)]
    each = -(-batch // (batch // each))
    return list(zip(x.split(each), out.split(each), strict=True))


def _gate_products(x: Tensor, weights: list[Tensor] | tuple[Tensor, ...]) -> Tensor:
    """The pre-activations (batch, seq, gates, heads, dim) of x (batch, seq, heads * in), by a weight (heads, dim, in)
    for each gate."""
    heads, dim, _ = weights[0].shape
    rows = x.reshape(-1, heads, weights[0].shape[2]).transpose(0, 1)
    if x.is_cpu:  # one product of all heads, where strides between them would take one for each
        out = x.new_empty((len(weights), heads, *x.shape[:2], dim)).permute(2, 3, 0, 1, 4)
    else:  # contiguous, for which the op has its fastest kernels
        out = x.new_empty((*x.shape[:2], len(weights), heads, dim))
    of_gates = out.flatten(0, 1).permute(1, 2, 0, 3).unbind()
    for to, weight in zip(of_gates, weights, strict=True):
        torch.bmm(rows, weight.transpose(1, 2), out=to)
    return out


class _GateProducts(torch.autograd.Function):
    """:func:`_gate_products` of x and the weights. The gradients of x are summed by the products."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, *weights: Tensor) -> Tensor:
        ctx.save_for_backward(x, *weights)
        return _gate_products(x, weights)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> Any:
        x, *weights = ctx.saved_tensors
        heads, _, size = weights[0].shape
        of_gates = dy.flatten(0, 1).permute(1, 2, 0, 3).unbind()  # (heads, tokens, dim) each
        rows = x.reshape(-1, heads, size).transpose(0, 1)
        dx, sizes = None, (*x.shape[:2], heads, size)
        if ctx.needs_input_grad[0]:
            dx = x.new_empty(sizes)
            to = dx.flatten(0, 1).transpose(0, 1)
            for gate, (d, weight) in enumerate(zip(of_gates, weights, strict=True)):
                torch.baddbmm(to, d, weight, beta=min(gate, 1), out=to)
            dx = dx.flatten(2)
        dweights = (
            torch.bmm(d.transpose(1, 2), rows) if wanted else None
            for d, wanted in zip(of_gates, ctx.needs_input_grad[1:], strict=True)
        )
        return dx, *dweights


def _gated(
    x: Tensor,
    options: tuple,
    projections: tuple[Tensor, ...],
    gates: Tensor,
    bias: Tensor,
    weight: Tensor,
    keep_states: bool,
) -> tuple[Tensor, ...]:
    """The mLSTM layer of x up to its output projection. `projections` are the weights of q, k, v and o; `gates` and
    `bias` those of i and f. Returns y, and what the backward needs: z, the gates, h and what the op keeps."""
    rows, sizes = x.reshape(-1, x.shape[2]), [t.shape[0] for t in projections]
    z = x.new_empty((*x.shape[:2], sum(sizes)))
    weights, parts = [t.t() for t in projections], list(z.flatten(0, 1).split(sizes, 1))
    if x.is_cpu and x.dtype == torch.float32:  # with the others, as a product of few columns takes long
        pre = x.new_empty((*x.shape[:2], gates.shape[0]))
        mm(rows, [*weights, gates.t()], [*parts, pre.flatten(0, 1)])
        pre += bias
    else:
        mm(rows, weights, parts)
        pre = F.linear(x, gates, bias)
    y, h, kept = mlstm_gated(z, *pre.chunk(2, -1), weight, None, *options, keep_states)
    return y, z, pre, h, kept


class _MlstmCell(torch.autograd.Function):
    """The mLSTM layer."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, options: tuple, *parameters: Tensor) -> Tensor:
        q, k, v, o, i, i_bias, f, f_bias, weight, out_proj = parameters
        gates, bias = torch.cat([i, f]), torch.cat([i_bias, f_bias])
        y, *kept = _gated(x, options, (q, k, v, o), gates, bias, weight, True)
        ctx.options = options
        ctx.save_for_backward(x, y, *kept, q, k, v, o, i, f, weight, out_proj)
        out = torch.empty_like(x, memory_format=torch.contiguous_format)
        mm(y.flatten(0, 1), [out_proj.t()], [out.flatten(0, 1)])
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor) -> Any:
        x, y, z, gates, h, kept, *weights, weight, out_proj = ctx.saved_tensors
        want_x, _, *wanted, want_norm, want_out = ctx.needs_input_grad
        dout, y = dout.reshape(-1, dout.shape[2]), y.flatten(0, 1)
        d_out_proj = _product(dout.t(), y) if want_out else None
        if not (want_x or want_norm or any(wanted)):
            return *[None] * 11, d_out_proj
        dy = _product(dout, out_proj).view(*x.shape[:2], -1)
        dz, _, _, dnorm = mlstm_gated_backward(
            dy, z, *gates.chunk(2, -1), weight, None, h, kept, *ctx.options, want_norm, True
        )
        dz, sizes = dz.flatten(0, 1), [t.shape[0] for t in weights]  # q, k, v, o, i, f
        dx = _product(dz, torch.cat(weights)).view(x.shape) if want_x else None
        dnorm = dnorm if want_norm else None
        if not any(wanted):
            return dx, *[None] * 9, dnorm, d_out_proj
        dq, dk, dv, do, di, df = _product(dz.t(), x.reshape(-1, x.shape[2])).split(sizes)
        di_bias, df_bias = dz[:, -2 * sizes[-1] :].sum(0).split(sizes[-1])
        return dx, None, dq, dk, dv, do, di, di_bias, df, df_bias, dnorm, d_out_proj


def _product(a: Tensor, b: Tensor) -> Tensor:
    out = a.new_empty((a.shape[0], b.shape[1]))
    mm(a, [b], [out])
    return out
