"""The loss of a language model's head."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from flash_xlstm.ops import _common, _errors

__all__ = ["linear_cross_entropy"]

# How many gradients of logits exist at a time: those of 2,048 tokens for a vocabulary of 50,304. Float32 logits exist
# for a quarter of these tokens at a time.
_ELEMENTS, _FEWEST_TOKENS, _MOST_TOKENS = 2048 * 51200, 512, 16384
_PARTS = 4
_TILE = 128  # rows of a product's tile

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_REDUCTIONS = ("mean", "sum", "none")


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    soft_cap: float | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
) -> Tensor:
    """The cross entropy of a linear layer's outputs, the logits ``hidden @ weight.T``.

    The logits are made in pieces. There is never a tensor of tokens x vocabulary.

    If hidden or weight needs gradients, the forward makes them along with the loss, so that each product is made once.
    Until the backward they take the memory of hidden, and of weight in float32. With `reduction` "none" the backward
    makes the logits again, since the gradient of each token's loss is not known before.

    Logits, loss and the sum of weight's gradient are float32. The gradients of logits have the dtype of hidden on CUDA,
    and are float32 on the CPU. Results and gradients are the same from run to run. Nothing waits for the GPU.

    Args:
        hidden: (..., dim); float32, bfloat16 or float16; CPU or CUDA.
        weight: (vocabulary, dim), in the dtype of hidden or in float32. The products take a float32 weight rounded to
            the dtype of hidden. Its gradient is float32 and not rounded.
        labels: (...), from 0 to vocabulary - 1, or ignore_index; int64 or int32.
        soft_cap: finite and greater than 0: the logits become ``soft_cap * tanh(logits / soft_cap)``. None: no cap.
        ignore_index: tokens with this label have no loss and no gradient, and do not count.
        reduction: "mean" over the tokens that count, which is NaN if none does, as in torch; their "sum"; or "none".
        label_smoothing: share of the target that is spread over the vocabulary, from 0 to 1, as in
            :func:`torch.nn.functional.cross_entropy`.
        z_loss: adds ``z_loss * logsumexp(logits)^2`` to each token's loss; at least 0.

    Returns:
        The loss, float32: a scalar, or (...) with `reduction` "none". Differentiable in hidden and weight, once.

    Raises:
        ValueError, TypeError: an argument of the wrong shape, dtype, device or value, by its name.
        RuntimeError: on CUDA, labels out of range. This is a device-side assertion, as in torch's own loss.
    """
    try:
        (hidden,) = _common.autocast(hidden)
        if weight.dtype != torch.float32:
            (weight,) = _common.autocast(weight)
        # Transforms hide which tensors need gradients. Under them the backward makes the logits again.
        makes = reduction != "none" and torch.is_grad_enabled() and not torch._C._are_functorch_transforms_active()
        return _linear_cross_entropy(
            hidden,
            weight,
            labels,
            reduction,
            None if soft_cap is None else _common.number("soft_cap", soft_cap),
            ignore_index if isinstance(ignore_index, torch.SymInt) else operator.index(ignore_index),
            _common.number("label_smoothing", label_smoothing),
            _common.number("z_loss", z_loss),
            makes and hidden.requires_grad,
            makes and weight.requires_grad,
        )[0]
    except Exception as error:
        if torch.compiler.is_compiling():
            raise
        raise _errors.explain(error, linear_cross_entropy, locals()) from None


_library = torch.library.Library("flash_xlstm", "FRAGMENT")
_OPTIONS = "float? soft_cap, int ignore_index, float label_smoothing, float z_loss"
_FLAGS = "bool hidden_gradient, bool weight_gradient"
# dhidden and dweight are gradients of the sum of the losses. The factors of the mean and of the backward come later:
# they can be too small for float16. Gradients that are not wanted are empty. So are those of reduction "none".
_library.define(
    f"linear_cross_entropy(Tensor hidden, Tensor weight, Tensor labels, str reduction, {_OPTIONS}, {_FLAGS}) -> "
    "(Tensor loss, Tensor count, Tensor dhidden, Tensor dweight)"
)
# For a loss that is the sum divided by `count`: scales dhidden and dweight.
_library.define(
    "linear_cross_entropy_backward(Tensor dloss, Tensor count, Tensor dhidden, Tensor dweight, ScalarType weight_dtype)"
    " -> (Tensor, Tensor)"
)
# For reduction "none": dloss has one value a token.
_library.define(
    f"linear_cross_entropies_backward(Tensor dloss, Tensor hidden, Tensor weight, Tensor labels, {_OPTIONS}, {_FLAGS})"
    " -> (Tensor, Tensor)"
)


def _shape(t: Tensor) -> str:
    return str(tuple(t.shape))


def _check(
    hidden: Tensor, weight: Tensor, labels: Tensor, ignore_index: int, reduction: str, vocabulary: int | None = None
) -> None:
    """Checks all arguments but the numbers, which the row operator checks. `vocabulary` is the whole one where `weight`
    is a part."""
    if hidden.dtype not in _DTYPES:
        plain = " (for float64 use flash_xlstm.reference)" if hidden.dtype == torch.float64 else ""
        raise TypeError(f"hidden has dtype {str(hidden.dtype)[6:]}; it must be float32, bfloat16 or float16{plain}")
    if hidden.dim() < 1:
        raise ValueError(f"hidden has shape {_shape(hidden)}; it must be (..., dim)")
    if weight.dim() != 2 or weight.shape[1] != hidden.shape[-1] or weight.shape[0] < 1:
        raise ValueError(
            f"weight has shape {_shape(weight)}; it must be (vocabulary, dim) = (at least 1, {hidden.shape[-1]})"
        )
    if weight.dtype not in (hidden.dtype, torch.float32):
        wanted = f"{str(hidden.dtype)[6:]}, as hidden, or float32" if hidden.dtype != torch.float32 else "float32"
        raise TypeError(f"weight has dtype {str(weight.dtype)[6:]}; it must be {wanted}")
    if labels.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"labels has dtype {str(labels.dtype)[6:]}; it must be int64 or int32")
    if labels.shape != hidden.shape[:-1]:
        raise ValueError(
            f"labels has shape {_shape(labels)}; it must be that of hidden without its last dimension, "
            f"{tuple(hidden.shape[:-1])}"
        )
    for name, t in (("weight", weight), ("labels", labels)):
        if t.device != hidden.device:
            raise ValueError(f"{name} is on {t.device}; it must be on the device of hidden, {hidden.device}")
    if reduction not in _REDUCTIONS:
        raise ValueError(f"reduction is {reduction!r:.80}; it must be 'mean', 'sum' or 'none'")
    _check_labels(labels, ignore_index, vocabulary or weight.shape[0])


def _check_labels(labels: Tensor, ignore_index: int, vocabulary: int) -> None:
    fits = ((labels >= 0) & (labels < vocabulary)) | (labels == ignore_index)
    wanted = f"they must be from 0 to {vocabulary - 1} (the vocabulary has {vocabulary} tokens) or ignore_index"
    if labels.is_cuda:
        torch._assert_async(fits.all(), f"labels are out of range; {wanted}, {ignore_index}")
    elif not fits.all():
        wrong = labels[~fits][0].item()
        raise ValueError(f"labels holds {wrong}; {wanted}, {ignore_index}")


def _multiple(size: int, of: int) -> int:
    return (size + of - 1) // of * of


def _pieces(tokens: int, vocabulary: int) -> tuple[int, int]:
    """For how many tokens the gradients of logits exist at a time, and for how many the logits."""
    most = max(_FEWEST_TOKENS, min(_MOST_TOKENS, _ELEMENTS // vocabulary // _TILE * _TILE))
    pieces = max(1, -(-tokens // most))
    piece = min(tokens, _multiple(-(-tokens // pieces), _TILE))
    return piece, min(piece, max(_FEWEST_TOKENS // 2, _multiple(most // _PARTS, _TILE)))


def _rows(like: Tensor, rows: int, columns: int, dtype: torch.dtype) -> Tensor:
    """An empty (rows, columns) tensor, in which every row begins at a multiple of at least 32 bytes."""
    return like.new_empty(rows, _multiple(columns, 16), dtype=dtype)[:, :columns]


def _product(a: Tensor, b: Tensor, out: Tensor, add: bool = False) -> None:
    """out = a b, or out += a b, in place."""
    dtype = {} if a.dtype == out.dtype else {"out_dtype": out.dtype}
    if add:
        torch.addmm(out, a, b, out=out, **dtype)
    else:
        torch.mm(a, b, out=out, **dtype)


def _run(
    hidden: Tensor, weight: Tensor, labels: Tensor, scale: Tensor | None, options: tuple[Any, ...],
    hidden_gradient: bool, weight_gradient: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Each token's loss, and the gradients of their sum. With `scale` (tokens,), each loss is multiplied by it in that
    sum. The gradient of weight is float32. A gradient that is not wanted is empty.

    Args:
        hidden: (tokens, dim).
        labels: (tokens,).
        options: those of the row operator.
    """
    tokens, vocabulary = hidden.shape[0], weight.shape[0]
    rows_of = torch.ops.flash_xlstm.cross_entropy_rows.default
    dtype, weight = hidden.dtype, weight.to(hidden.dtype).contiguous()
    if not hidden.is_cuda:  # on the CPU torch has no product of 16-bit types with a float32 result
        hidden, weight = hidden.float(), weight.float()
    gradients = hidden_gradient or weight_gradient
    piece, part = _pieces(tokens, vocabulary)
    dhidden = hidden.new_empty(hidden.shape if hidden_gradient else 0, dtype=dtype)
    dweight = weight.new_empty(weight.shape if weight_gradient else 0, dtype=torch.float32)
    if tokens == 0:
        empty = _rows(hidden, 0, vocabulary, torch.float32)  # the row operator then only checks the options
        return rows_of(empty, labels, None, None, *options), dhidden, dweight.zero_()
    transposed = weight.t()
    logits = _rows(hidden, part, vocabulary, torch.float32)
    dlogits = _rows(hidden, piece, vocabulary, hidden.dtype) if gradients else None
    losses = []
    for start in range(0, tokens, piece):
        end = min(start + piece, tokens)
        for first in range(start, end, part):
            last = min(first + part, end)
            to = logits[: last - first]
            _product(hidden[first:last], transposed, to)
            losses.append(
                rows_of(
                    to,
                    labels[first:last],
                    None if scale is None else scale[first:last],
                    None if dlogits is None else dlogits[first - start : last - start],
                    *options,
                )
            )
        if dlogits is None:
            continue
        made = dlogits[: end - start]
        if hidden_gradient:
            if dhidden.dtype == made.dtype:
                torch.mm(made, weight, out=dhidden[start:end])
            else:
                dhidden[start:end] = made @ weight
        if weight_gradient:
            _product(made.t(), hidden[start:end], dweight, add=start > 0)
    return torch.cat(losses), dhidden, dweight


def _rows_of(hidden: Tensor, tokens: int) -> Tensor:
    return hidden.reshape(tokens, hidden.shape[-1])


def _forward(hidden, weight, labels, reduction, soft_cap, ignore_index, label_smoothing, z_loss, *flags):
    _check(hidden, weight, labels, ignore_index, reduction)
    flat = labels.reshape(-1)
    losses, dhidden, dweight = _run(
        _rows_of(hidden, len(flat)), weight, flat, None, (soft_cap, ignore_index, label_smoothing, z_loss), *flags
    )
    count = (flat != ignore_index).sum().float() if reduction == "mean" else losses.new_ones(())
    loss = losses.view(labels.shape) if reduction == "none" else losses.sum() / count
    return loss, count, dhidden.view(hidden.shape) if flags[0] else dhidden, dweight


def _scaled(t: Tensor, factor: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.ops.flash_xlstm.scaled.default(t, factor, t.new_empty(0, dtype=dtype))


def _backward_of_sum(dloss, count, dhidden, dweight, weight_dtype):
    factor = dloss.float() / count
    return _scaled(dhidden, factor, dhidden.dtype), _scaled(dweight, factor, weight_dtype)


def _backward_of_each(dloss, hidden, weight, labels, soft_cap, ignore_index, label_smoothing, z_loss, *flags):
    scale, factor = dloss.reshape(-1).float(), None
    if hidden.dtype == torch.float16 and len(scale) > 0:  # probabilities times a small dloss would become 0
        factor = scale.abs().amax()
        factor = torch.where((factor > 0) & factor.isfinite(), factor, 1.0)
        scale = scale / factor
    _, dhidden, dweight = _run(
        _rows_of(hidden, len(scale)), weight, labels.reshape(-1), scale,
        (soft_cap, ignore_index, label_smoothing, z_loss), *flags,
    )  # fmt: skip
    if factor is not None:
        dhidden, dweight = _scaled(dhidden, factor, hidden.dtype), _scaled(dweight, factor, weight.dtype)
    return dhidden.view(hidden.shape) if flags[0] else dhidden, dweight.to(weight.dtype)


def _without_autocast(form: Callable[..., Any]) -> Callable[..., Any]:
    """Runs `form` without autocast. Autocast concerns what the caller passes. Here it would round float32 products."""

    def run(*args: Any) -> Any:
        with torch._C._DisableAutocast():
            return form(*args)

    return run


for _name, _form in (
    ("linear_cross_entropy", _forward),
    ("linear_cross_entropy_backward", _backward_of_sum),
    ("linear_cross_entropies_backward", _backward_of_each),
):
    for _device in ("CPU", "CUDA"):
        _library.impl(_name, _without_autocast(_form), _device)


@_common.register_fake("linear_cross_entropy")
def _(hidden, weight, labels, reduction, soft_cap, ignore_index, label_smoothing, z_loss, of_hidden, of_weight):
    _common.no_mixed_meta(hidden, of="hidden", weight=weight, labels=labels)
    return (
        hidden.new_empty(labels.shape if reduction == "none" else (), dtype=torch.float32),
        hidden.new_empty((), dtype=torch.float32),
        hidden.new_empty(hidden.shape if of_hidden else 0),
        weight.new_empty(weight.shape if of_weight else 0, dtype=torch.float32),
    )


@_common.register_fake("linear_cross_entropy_backward")
def _(dloss, count, dhidden, dweight, weight_dtype):
    return dhidden.new_empty(dhidden.shape), dweight.new_empty(dweight.shape, dtype=weight_dtype)


@_common.register_fake("linear_cross_entropies_backward")
def _(dloss, hidden, weight, labels, soft_cap, ignore_index, label_smoothing, z_loss, of_hidden, of_weight):
    return hidden.new_empty(hidden.shape if of_hidden else 0), weight.new_empty(weight.shape if of_weight else 0)


def _setup_context(ctx, inputs, output) -> None:
    hidden, weight, labels, ctx.reduction, *ctx.options, of_hidden, of_weight = inputs
    _, count, dhidden, dweight = output
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(count)
    ctx.made, ctx.weight_dtype = (of_hidden, of_weight), weight.dtype
    # dhidden and dweight stay differentiable, so that a double backward is refused with its message.
    ctx.save_for_backward(*((count, dhidden, dweight) if any(ctx.made) else (hidden, weight, labels)))


def _backward(ctx, dloss, *_):
    wanted = tuple(ctx.needs_input_grad[:2])
    nothing = (None,) * 8
    if dloss is None:
        return None, None, *nothing
    if any(ctx.made):
        made = ctx.saved_tensors
    else:
        hidden, weight, labels = ctx.saved_tensors
        if ctx.reduction == "none":
            gradients = _linear_cross_entropies_backward(dloss, hidden, weight, labels, *ctx.options, *wanted)
            return *(t if want else None for t, want in zip(gradients, wanted, strict=True)), *nothing
        made = _linear_cross_entropy(hidden, weight, labels, ctx.reduction, *ctx.options, *wanted)[1:]
    gradients = _linear_cross_entropy_backward(dloss, *made, ctx.weight_dtype)
    return *(t if want else None for t, want in zip(gradients, wanted, strict=True)), *nothing


_linear_cross_entropy = _common.differentiable("linear_cross_entropy", _setup_context, _backward)
_linear_cross_entropy_backward = _common.no_double_backward("linear_cross_entropy_backward")
_linear_cross_entropies_backward = _common.no_double_backward("linear_cross_entropies_backward")
