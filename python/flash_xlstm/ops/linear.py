"""Products: of few rows with a weight matrix, bound by the time to read the weights; of many rows in float32; and of
many rows in 16 bits, with what follows them in a block."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.autograd.forward_ad as forward_ad
from torch import Tensor

from flash_xlstm import _build
from flash_xlstm._build import LIMITS
from flash_xlstm.ops import _common, _errors

_TILES = _build.build_info()["cpu_isa"] == "AVX-512 and AMX"
_LEAST_ROWS = 64  # with fewer, packing b takes too long a part


def linear_rows(x: Tensor, weight: Tensor, bias: Tensor | None = None, *, constant_weights: bool = False) -> Tensor:
    """``x @ weight.T + bias`` for at most 16 rows. Sums are float32 and rounded once. Runs repeat bit for bit.

    Args:
        x: (..., in), at most 16 rows in all. On the CPU float32, bfloat16 or float16; on CUDA bfloat16.
        weight: (out, in), dtype of x, as ``torch.nn.Linear`` keeps it. On CUDA `in` must be a multiple of 8.
        bias: (out,), dtype of x, or None.
        constant_weights: a promise that no kernel which may still be running on the GPU writes `weight`. A Hopper GPU
            then begins to read it while the previous kernel runs. The promise concerns kernels with programmatic
            dependent launch, of this package and of others: they let the next kernel start before they end.

    Returns:
        (..., out) in the dtype of x.

    Raises:
        ValueError, TypeError: an argument has a wrong shape, dtype, device or layout. The text names it.
        RuntimeError: a gradient is needed, and this product has none. Use ``torch.nn.functional.linear``.
    """
    try:
        _common.check_flag("constant_weights", constant_weights)
        _no_gradient("linear_rows", x, weight, bias)
        return torch.ops.flash_xlstm.linear_rows(x, weight, bias, constant_weights)
    except Exception as error:
        if torch.compiler.is_compiling():
            raise
        raise _errors.explain(error, linear_rows, locals()) from None


def fused_linear_rows(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None] | None = None,
    *,
    residual: Tensor | None = None,
    swiglu: bool = False,
    constant_weights: bool = False,
) -> list[Tensor]:
    """:func:`linear_rows` with several weights, a residual or SwiGLU; one launch on CUDA.

    With ``y_p = x @ weights[p].T + biases[p]`` the results are ``[y_0, y_1, ...]``, ``[residual + y_0]`` with
    `residual`, and ``[silu(y_0) * y_1]`` with `swiglu`. On CUDA they are rounded once.

    Args:
        x: as for :func:`linear_rows`.
        weights: up to 8, (out_p, in), dtype and layout as for :func:`linear_rows`.
        biases: a (out_p,) or None for each weight, or None for no biases.
        residual: (..., out_0), dtype of x; allowed with one weight only.
        swiglu: whether to return the SwiGLU of two products. It needs two weights of the same shape, and no residual.
        constant_weights: as for :func:`linear_rows`.

    Returns:
        (..., out_p) for each weight; one tensor with `swiglu`.

    Raises:
        ValueError, TypeError, RuntimeError: as :func:`linear_rows`.
    """
    try:
        _common.check_flag("swiglu", swiglu)
        _common.check_flag("constant_weights", constant_weights)
        biases = [None] * len(weights) if biases is None else list(biases)
        _no_gradient("fused_linear_rows", x, *weights, *biases, residual)
        return torch.ops.flash_xlstm.fused_linear_rows(x, list(weights), biases, residual, swiglu, constant_weights)
    except Exception as error:
        if torch.compiler.is_compiling():
            raise
        raise _errors.explain(error, fused_linear_rows, locals()) from None


def mm(a: Tensor, bs: Sequence[Tensor], outs: Sequence[Tensor]) -> None:
    """``torch.mm(a, b, out=out)`` for each of `bs` and `outs`, which no input may overlap. On a CPU with AMX tiles
    float32 products are made of bfloat16 ones, and are at least as exact. Call it where no gradients are recorded."""
    tiles = _TILES and a.dtype == torch.float32 and a.is_cpu and a.shape[0] >= _LEAST_ROWS
    if not (tiles and _common.is_eager() and _float_products(a, bs, outs)):  # numbers that tiles do not hold, as inf
        for b, out in zip(bs, outs, strict=True):
            torch.mm(a, b, out=out)


def _no_gradient(name: str, *given: Tensor | None) -> None:
    if forward_ad._current_level >= 0:
        _common.refuse_forward_mode(name, given)
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in given):
        raise RuntimeError(
            f"{name} has no gradient, but an argument requires one. Call it under torch.no_grad(), or use "
            "torch.nn.functional.linear, which is differentiable."
        )


@_common.register_fake("linear_rows")
def _(x: Tensor, weight: Tensor, bias: Tensor | None, constant_weights: bool = False) -> Tensor:
    _common.no_mixed_meta(x, of="x", weight=weight, bias=bias)
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


@_common.register_fake("fused_linear_rows")
def _(x, weights, biases, residual, swiglu, constant_weights=False) -> list[Tensor]:
    given = {f"weights[{n}]": t for n, t in enumerate(weights)} | {f"biases[{n}]": t for n, t in enumerate(biases)}
    _common.no_mixed_meta(x, of="x", residual=residual, **given)
    return [x.new_empty((*x.shape[:-1], weight.shape[0])) for weight in (weights[:1] if swiglu else weights)]


@_common.register_fake("joined_product")
def _(a, weights):
    _common.no_mixed_meta(a, of="a", **{f"weights[{n}]": t for n, t in enumerate(weights)})
    return a.new_empty((a.shape[0], sum(w.shape[0] for w in weights)))


@_common.register_fake("added_product")
def _(a, weight, residual):
    _common.no_mixed_meta(a, of="a", weight=weight, residual=residual)
    return a.new_empty((a.shape[0], weight.shape[0]))


@_common.register_fake("swiglu_product")
def _(a, left, right):
    _common.no_mixed_meta(a, of="a", left=left, right=right)
    return a.new_empty((a.shape[0], 2 * left.shape[0])), a.new_empty((a.shape[0], left.shape[0]))


@_common.register_fake("swiglu_product_backward")
def _(dout, weight, z, remake):
    _common.no_mixed_meta(dout, of="dout", weight=weight, z=z)
    return z.new_empty(z.shape), z.new_empty((z.shape[0], weight.shape[1]) if remake else (0, 0))


def products_serve(rows: Tensor, depth: int, *columns: int) -> bool:
    """Whether the products below take `rows`, as a left operand in sums over `depth`, with weights that have so many
    `columns`: in 16 bits, on a device of compute capability 9.0."""
    multiple = LIMITS["product_cuda_multiple"] if len(columns) == 1 else LIMITS["product_cuda_part"]
    return (
        rows.is_cuda
        and rows.dtype in (torch.bfloat16, torch.float16)
        and depth % LIMITS["product_cuda_multiple"] == 0 < depth
        and all(count % multiple == 0 < count for count in columns)
        and len(columns) <= LIMITS["product_cuda_max_parts"]
        and _has_products(rows.device)
    )


def _has_products(device: torch.device) -> bool:
    return "90a" in _build.build_info()["architectures"] and torch.cuda.get_device_capability(device) == (9, 0)


# A constant of torch.compile's graphs, as torch.compiler.assume_constant_result makes it, which imports torch._dynamo.
_has_products._dynamo_marked_constant = True  # type: ignore[attr-defined]

# All are contiguous (rows, columns).
# (a, weights) -> the products a weight^T, side by side.
joined_product = _common.no_double_backward("joined_product")
# (a, weight, residual) -> a weight^T + residual, rounded once.
added_product = _common.no_double_backward("added_product")
# (a, left, right) -> z = [a left^T, a right^T] side by side, and its SwiGLU, with the bits that ops.swiglu(z) gives.
swiglu_product = _common.no_double_backward("swiglu_product")
# (dout, weight, z, remake) -> the gradient of z where SwiGLU's output goes through `weight` (out, columns), and that
# output (empty without `remake`), with the bits that swiglu_joined_backward gives for the rounded dout weight.
swiglu_product_backward = _common.no_double_backward("swiglu_product_backward")

# (a, bs, outs) -> whether outs[x] = a bs[x]. If not, they may hold anything, and another product must write them.
_float_products = _common.without_gradients("float_products")


@_common.register_fake("float_products")
def _(a, bs, outs) -> bool:
    return False
