"""The large products of a block's halves: in the dtype of x or, where torchao's layers hold the weights, in float8.

In 16 bits on Hopper, products with weights as they lie are this package's, with residuals and SwiGLU in their kernels
(csrc/cuda/linear/hopper/products.cu). Those of the other gradients are torch's. For weights of certain sizes cuBLAS
takes less time and energy in two parts (:func:`_first_part`).

In float8 each matrix of a product is cast by :mod:`flash_xlstm.ops.float8`: the left one by its rows, the right one by
its columns, as torchao's recipe "rowwise" does. Weights that are joined are cast as one. For the output and for the
weights' gradients that changes nothing. The input's gradient is then one product, where torchao adds up one for each
weight, and the scale of a column is that of all weights together.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from flash_xlstm.ops import _common, linear
from flash_xlstm.ops.float8 import float8_cast
from flash_xlstm.ops.linear import products_serve
from flash_xlstm.ops.pointwise import swiglu_joined_backward


class Float8(NamedTuple):
    """How torchao's layers multiply in float8."""

    emulated: bool  # in float32, with rounded values
    fast_sums: tuple[bool, bool, bool]  # of the output, of the input's gradient and of the weight's gradient
    scales_last: bool  # without fast sums, torch's product with scales is slow on this device


class Float8Gradient(NamedTuple):
    """An output's gradient (rows, out) in float8, and transposed, each with its scales."""

    rows: Tensor
    row_scales: Tensor
    columns: Tensor
    column_scales: Tensor
    dtype: torch.dtype


def linear_kind(x: Tensor, *layers: Any) -> tuple[type[nn.Module], Float8 | None]:
    """The class of a half's large layers, and how they multiply. :class:`torch.nn.Linear` where they differ, or where
    torchao's layers do something that the halves do not know."""
    kind = type(layers[0])
    if kind is nn.Linear or kind.__name__ != "Float8Linear" or kind.__module__ != "torchao.float8.float8_linear":
        return nn.Linear, None
    config, sums = layers[0].config, layers[0].linear_mm_config
    if any(
        type(layer) is not kind
        or (layer.config is not config and layer.config != config)
        or layer.linear_mm_config != sums
        for layer in layers
    ):
        return nn.Linear, None
    casts = (
        config.cast_config_input,
        config.cast_config_input_for_grad_weight,
        config.cast_config_weight,
        config.cast_config_weight_for_grad_input,
        config.cast_config_grad_output,
        config.cast_config_grad_output_for_grad_weight,
    )
    products = (sums.output, sums.grad_input, sums.grad_weight)
    emulated = sums.output.emulate
    known = (
        config.round_scales_to_power_of_2
        and all(
            cast.scaling_type.value == "dynamic"
            and cast.scaling_granularity.value == "axiswise"
            and cast.target_dtype == torch.float8_e4m3fn
            for cast in casts
        )
        and all(p.emulate == emulated and not p.fp8_output and not p.pad_inner_dim for p in products)
        and kind.forward.__module__ == kind.__module__
    )
    if not known:
        return nn.Linear, None
    fast = (sums.output.use_fast_accum, sums.grad_input.use_fast_accum, sums.grad_weight.use_fast_accum)
    return kind, Float8(emulated, fast, not emulated and _scales_last(x.device))


_CUBLAS_SCALES_ROWS = tuple(int(part) for part in (torch.version.cuda or "0.0").split(".")[:2]) >= (12, 9)


def _scales_last(device: torch.device) -> bool:
    """Whether torch multiplies with a scale for each row by a kernel that is slow without fast sums. On compute
    capability 9.0 with CUDA 12.9 or later it calls cuBLAS."""
    return device.type == "cuda" and not (_CUBLAS_SCALES_ROWS and torch.cuda.get_device_capability(device)[0] == 9)


# A constant of torch.compile's graphs, as torch.compiler.assume_constant_result makes it, which imports torch._dynamo.
_scales_last._dynamo_marked_constant = True  # type: ignore[attr-defined]


def joined(weights: tuple[Tensor, ...]) -> Tensor:
    """Several weights as one: a copy, which is not kept."""
    return weights[0] if len(weights) == 1 else torch.cat(weights)


def product(rows: Tensor, weights: tuple[Tensor, ...], float8: Float8 | None) -> Tensor:
    """``rows @ joined(weights).T``: (rows, out)."""
    if float8 is None:
        if products_serve(rows, rows.shape[1], *(w.shape[0] for w in weights)):
            return linear.joined_product(rows, list(weights))
        return torch.mm(rows, joined(weights).t())
    left, left_scales, _, _ = float8_cast([rows], True, False)
    right, right_scales, _, _ = float8_cast(list(weights), True, False)
    return _scaled(left, left_scales, right, right_scales, rows.dtype, float8, 0)


def added_product(added: Tensor, rows: Tensor, weight: Tensor) -> Tensor:
    """``added + rows @ weight.T``, rounded once."""
    if products_serve(rows, rows.shape[1], weight.shape[0]):
        return linear.added_product(rows, weight, added)
    return torch.addmm(added, rows, weight.t())


def swiglu_product(
    rows: Tensor, weights: tuple[Tensor, ...], float8: Float8 | None, wanted: bool = True
) -> tuple[Tensor, Tensor | None]:
    """:func:`product`, and SwiGLU of its halves: not `wanted`, it may be None. The product has the same bits then."""
    columns = sum(w.shape[0] for w in weights) // 2
    if float8 is None and products_serve(rows, rows.shape[1], columns):
        left, right = weights if len(weights) == 2 else (weights[0][:columns], weights[0][columns:])
        return linear.swiglu_product(rows, left, right)
    z = product(rows, weights, float8)
    return z, torch.ops.flash_xlstm.swiglu_joined(z) if wanted else None


def cast_gradient(rows: Tensor, for_weight: bool, float8: Float8 | None) -> Any:
    """An output's gradient as :func:`input_gradient` and, with `for_weight`, :func:`weight_gradient` take it."""
    if float8 is None:
        return rows
    by_row, row_scales, by_column, column_scales = float8_cast([rows], True, for_weight)
    return Float8Gradient(by_row, row_scales, by_column, column_scales, rows.dtype)


def input_gradient(gradient: Any, weights: tuple[Tensor, ...], float8: Float8 | None) -> Tensor:
    """The gradient of the rows of :func:`product`."""
    if float8 is None:
        return torch.mm(gradient, joined(weights))
    _, _, right, right_scales = float8_cast(list(weights), False, True)
    return _scaled(gradient.rows, gradient.row_scales, right, right_scales, gradient.dtype, float8, 1)


def swiglu_gradient(
    gradient: Any, weight: Tensor, z: Tensor, remake: bool, float8: Float8 | None
) -> tuple[Tensor, Tensor]:
    """The gradient of SwiGLU's inputs z, where :func:`product` took its output and `weight`. With `remake` also that
    output."""
    if float8 is None and products_serve(gradient, *weight.shape):
        return linear.swiglu_product_backward(gradient, weight, z, remake)
    return swiglu_joined_backward(input_gradient(gradient, (weight,), float8), z, remake)


def weight_gradient(gradient: Any, rows: Tensor, float8: Float8 | None) -> Tensor:
    """The gradient of the joined weights of :func:`product`."""
    if float8 is None:
        return _sum_over_rows(gradient, rows)
    _, _, right, right_scales = float8_cast([rows], False, True)
    return _scaled(gradient.columns, gradient.column_scales, right, right_scales, rows.dtype, float8, 2)


def _sum_over_rows(left: Tensor, right: Tensor) -> Tensor:
    """``left.T @ right``, in one product or in two that make parts of its longer side."""
    sizes = left.shape[1], right.shape[1]
    by_columns = sizes[1] > sizes[0]
    first = _first_part(max(sizes), min(sizes), _sms(left.device)) if left.dtype in _TILED else None
    if first is None:
        return torch.mm(left.t(), right)
    pairs = [
        (left, right[:, part]) if by_columns else (left[:, part], right)
        for part in (slice(0, first), slice(first, None))
    ]
    # Inductor makes the parts in place. vmap, that of is_grads_batched too, knows no out=.
    if torch.is_grad_enabled() or not _common.is_eager() or torch._C._functorch.is_legacy_batchedtensor(left):
        return torch.cat([torch.mm(a.t(), b) for a, b in pairs], int(by_columns))
    out = left.new_empty(sizes)
    places = (out[:, :first], out[:, first:]) if by_columns else (out[:first], out[first:])
    for (a, b), place in zip(pairs, places, strict=True):
        torch.mm(a.t(), b, out=place)
    return out


_TILED = (torch.bfloat16, torch.float16)
_TILE = 256 * 128  # of cuBLAS's fastest kernels, and the one that takes least energy


def _first_part(longer: int, shorter: int, sms: int) -> int | None:
    """How much of its longer side a weight's gradient gets from a product of its own; None: all.

    Where the last wave of tiles of 256 x 128 would leave a tenth of all waves' time unused, cuBLAS takes others. These
    are slower at the GPU's power limit (docs/experiments.md). The first part fills whole waves, and leaves half a wave
    or more. From two waves on.
    """
    area = sms * _TILE  # of a wave
    waves = longer * shorter / area if sms else 0.0
    if waves < 2 or math.ceil(waves) < 1.1 * waves:
        return None
    return math.floor(waves - 0.5) * area // shorter // 128 * 128 or None


def _sms(device: torch.device) -> int:
    """The SMs of a device of compute capability 9.0, where two parts were measured; 0 for others."""
    if device.type != "cuda" or not torch.cuda.is_available() or torch.cuda.get_device_capability(device) != (9, 0):
        return 0
    return torch.cuda.get_device_properties(device).multi_processor_count


_sms._dynamo_marked_constant = True  # type: ignore[attr-defined]  # as _scales_last


def _scaled(
    a: Tensor, a_scales: Tensor, b: Tensor, b_scales: Tensor, dtype: torch.dtype, float8: Float8, which: int
) -> Tensor:
    """``a @ b.T`` in `dtype`, of (m, k) and (n, k) in float8 with scales (m, 1) and (n, 1)."""
    if float8.emulated:
        return torch.mm(a.float() * a_scales, (b.float() * b_scales).t()).to(dtype)
    fast, b_scales = float8.fast_sums[which], b_scales.t()
    # torch's product with a scale for each row returns bfloat16, and so do torchao's layers in every dtype.
    if fast or not float8.scales_last:
        out = torch._scaled_mm(a, b.t(), a_scales, b_scales, out_dtype=torch.bfloat16, use_fast_accum=fast)
    else:
        one = a_scales.new_ones(())
        out = torch._scaled_mm(a, b.t(), one, one, out_dtype=torch.bfloat16, use_fast_accum=False)
        out = out * (a_scales * b_scales)
    return out.to(dtype)
