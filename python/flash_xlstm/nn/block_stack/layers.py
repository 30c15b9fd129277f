"""Small layers of the mLSTM and sLSTM blocks."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

from flash_xlstm import ops, reference
from flash_xlstm._build import LIMITS
from flash_xlstm.nn.block_stack.configuration import FeedForwardConfig
from flash_xlstm.nn.linear import nothing_looks_on, torch_own, unchanged
from flash_xlstm.nn.packing import check_padding, check_sequence, refuse_step, sequence_of_tokens, tokens_between
from flash_xlstm.nn.state import fitting


def _relu_squared(x: Tensor) -> Tensor:
    return F.relu(x).square()


_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "relu": F.relu,
    "relu^2": _relu_squared,  # a lambda cannot be pickled
    "sigmoid": torch.sigmoid,
    "swish": F.silu,
    "selu": F.selu,
}
_CONV_FORWARD = torch_own(nn.Conv1d.forward, nn.modules.conv)


def small_init(weight: Tensor, dim: int) -> None:
    """Normal initialization with the deviation sqrt(2 / (5 dim)) of "Transformers without Tears" (arXiv 1910.05895)."""
    nn.init.normal_(weight, std=math.sqrt(2 / (5 * dim)))


def wang_init(weight: Tensor, dim: int, num_blocks: int | None) -> None:
    """Normal initialization with the deviation 2 / (num_blocks sqrt(dim)) of GPT-J's output projections."""
    nn.init.normal_(weight, std=2 / (num_blocks or 1) / math.sqrt(dim))


def zero_bias(layer: nn.Linear) -> None:
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)


class LayerNorm(nn.Module):
    """Layer norm with the factor ``1 + weight``, which weight decay pulls to 1.

    Shape: (..., num_features) in and out.
    """

    def __init__(self, num_features: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.zeros(num_features))

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight
        return F.layer_norm(x, weight.shape, 1.0 + weight, None, self.eps)

    def reset_parameters(self) -> None:
        nn.init.zeros_(self.weight)

    def extra_repr(self) -> str:
        return f"{self.weight.numel()}, eps={self.eps}"


class MultiHeadLayerNorm(nn.Module):
    """Layer norm of each head. The factor of a feature is ``1 + weight``, or 1 without weight.

    Shape: (batch, seq, num_heads, head_dim) in, (batch, seq, num_heads * head_dim) out.
    """

    def __init__(self, num_features: int, *, weight: bool = True, eps: float = 1e-5) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.zeros(num_features)) if weight else None

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight
        if weight is None:
            return F.layer_norm(x, x.shape[-1:], eps=self.eps).flatten(2)
        dtype = torch.promote_types(x.dtype, weight.dtype)
        x, weight = x.to(dtype), 1.0 + weight.to(dtype)
        if x.is_cuda:  # two passes; still faster on a CPU than a group norm
            return F.layer_norm(x, x.shape[-1:], eps=self.eps).flatten(2) * weight
        y = F.group_norm(x.flatten(2).flatten(0, 1), x.shape[2], weight, None, self.eps)
        return y.view(*x.shape[:2], weight.shape[0])

    def reset_parameters(self) -> None:
        if self.weight is not None:
            nn.init.zeros_(self.weight)


class LinearHeadwiseExpand(nn.Module):
    """A linear layer with a block-diagonal matrix: each of `num_heads` slices of the features has its own projection.

    Shape: (..., features) in and out; ``weight`` is (num_heads, out, in) with in = out = features / num_heads.
    """

    def __init__(self, features: int, num_heads: int, *, bias: bool = False) -> None:
        super().__init__()
        if num_heads < 1 or features % num_heads:
            raise ValueError(f"features is {features}; it must be a multiple of num_heads, which is {num_heads}")
        self.num_heads = num_heads
        size = features // num_heads
        self.weight = nn.Parameter(torch.empty(num_heads, size, size))
        self.bias = nn.Parameter(torch.zeros(features)) if bias else None
        self.reset_parameters()

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight
        y = torch.einsum("...hi,hoi->...ho", x.unflatten(-1, (self.num_heads, weight.shape[-1])), weight).flatten(-2)
        return y if self.bias is None else y + self.bias

    def reset_parameters(self, dim: int | None = None) -> None:
        """`dim` is that of :func:`small_init`; default: a block's size."""
        small_init(self.weight, dim or self.weight.shape[-1])
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def extra_repr(self) -> str:
        return f"{self.num_heads * self.weight.shape[-1]}, num_heads={self.num_heads}, bias={self.bias is not None}"


def _only_holds_parameters(conv: nn.Module) -> bool:
    """Whether an op with the parameters of `conv` may replace a call of it."""
    return (
        unchanged(conv, nn.Conv1d)
        and not (conv._backward_hooks or conv._backward_pre_hooks or _has_any_global_hook())
        and nn.Conv1d.forward is _CONV_FORWARD
        and (torch.compiler.is_compiling() or nothing_looks_on())
    )


class CausalConv1d(nn.Module):
    """SiLU of a causal depthwise convolution, or of the input itself with `kernel_size` 0.

    Shape: (batch, seq, channels) in and out. The state is the last kernel_size - 1 inputs, (batch, kernel_size - 1,
    channels), or None with `kernel_size` 0.
    """

    def __init__(self, channels: int, kernel_size: int) -> None:
        super().__init__()
        self.kernel_size = kernel_size
        # `conv` holds the parameters, with the usual names and initialization.
        self.conv = nn.Conv1d(channels, channels, kernel_size, groups=channels) if kernel_size else None
        self.channels = channels

    def forward(
        self,
        x: Tensor,
        state: Tensor | None = None,
        *,
        return_state: bool = False,
        inplace: bool = False,
        cu_seqlens: Tensor | None = None,
        padding: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """`inplace` is for one token without gradients. It updates `state`, or a copy of it if its dtype is not that of
        x. `cu_seqlens` and `padding` are as in :meth:`xLSTMBlockStack.forward`."""
        refuse_step(inplace, cu_seqlens)
        check_sequence("x", x, self.channels, step=inplace)
        conv = self.conv
        if conv is None:
            return F.silu(x), None
        if padding is not None:
            return self._beside_padding(x, state, return_state, inplace, cu_seqlens, padding)
        (state,) = fitting((state,), x, (x.dtype,), written=inplace)
        compiled = self.kernel_size <= LIMITS["conv_max_kernel"] and x.dtype != torch.float64
        if cu_seqlens is not None and not (compiled and _only_holds_parameters(conv)):
            return self._packed_by_the_module(conv, x, state, return_state, cu_seqlens)
        if not _only_holds_parameters(conv):
            return self._by_the_module(conv, x, state, return_state, inplace)
        weight, bias = conv.weight[:, 0], conv.bias
        namespace = ops if compiled else reference
        if inplace and state is not None:
            return namespace.causal_conv1d_step(x[:, 0], weight, bias, state, activation="silu")[:, None], state
        y = namespace.causal_conv1d(
            x, weight, bias, activation="silu", initial_state=state, cu_seqlens=cu_seqlens,
            return_final_state=return_state,
        )  # fmt: skip
        return y if return_state else (y, None)

    def _beside_padding(
        self,
        x: Tensor,
        state: Tensor | None,
        return_state: bool,
        inplace: bool,
        cu_seqlens: Tensor | None,
        padding: Tensor,
    ) -> tuple[Tensor, Tensor | None]:
        """The same of rows with padding, where 0 stands for what is before the first token, or `state`."""
        check_padding(padding, x, cu_seqlens)
        first, count = tokens_between(padding)
        x = x.masked_fill(padding[..., None], 0.0)
        if state is None and not (return_state or inplace):
            return self(x)
        (state,) = fitting((state,), x, (x.dtype,), written=inplace)
        before = self.kernel_size - 1
        around = torch.arange(before, device=x.device)
        inputs = F.pad(x, (0, 0, before, 0))
        at = lambda place: (place + around)[..., None].expand(-1, -1, self.channels)  # noqa: E731
        if state is not None:
            inputs = inputs.scatter(1, at(first), state)
        y, _ = self(inputs[:, before:], inputs[:, :before])
        last = inputs.gather(1, at(first + count))
        return y, state.copy_(last) if inplace and state is not None else last

    def _by_the_module(
        self, conv: nn.Module, x: Tensor, state: Tensor | None, return_state: bool, inplace: bool
    ) -> tuple[Tensor, Tensor | None]:
        """The same by a call of `conv`, which may do more than a convolution with its parameters."""
        before = x.new_zeros(x.shape[0], self.kernel_size - 1, self.channels) if state is None else state
        inputs = torch.cat([before, x], 1)
        y = F.silu(conv(inputs.transpose(1, 2)).transpose(1, 2))
        if not return_state and not inplace:
            return y, None
        last = inputs[:, x.shape[1] :]
        return y, state.copy_(last) if inplace and state is not None else last.clone()

    def _packed_by_the_module(
        self, conv: nn.Module, x: Tensor, state: Tensor | None, return_state: bool, cu_seqlens: Tensor
    ) -> tuple[Tensor, Tensor | None]:
        """Packed sequences as `conv` takes them: kernel_size - 1 inputs, of `state` or zeros, before each."""
        before, places = self.kernel_size - 1, torch.arange(x.shape[1], device=x.device)
        rows, starts = cu_seqlens.shape[0] - 1, cu_seqlens.long()
        tokens = places + before * (sequence_of_tokens(starts, x.shape[1]) + 1)
        inputs = x.new_zeros(x.shape[1] + rows * before, self.channels).index_copy(0, tokens, x[0])
        around = torch.arange(before, device=x.device) + before * torch.arange(rows, device=x.device)[:, None]
        if state is not None:
            inputs = inputs.index_copy(0, (starts[:-1, None] + around).flatten(), state.flatten(0, 1))
        y = F.silu(conv(inputs.t()[None])[0].t()[tokens - before])[None]
        return y, inputs[starts[1:, None] + around] if return_state else None

    def reset_parameters(self) -> None:
        if self.conv is not None:
            self.conv.reset_parameters()


class GatedFeedForward(nn.Module):
    """``proj_down(act_fn(gate) * up)``, where ``proj_up(x)`` is the concatenation of gate and up.

    Shape: (..., embedding_dim) in and out.
    """

    def __init__(self, config: FeedForwardConfig) -> None:
        super().__init__()
        self.config = config
        self.proj_up = nn.Linear(config.embedding_dim, 2 * config._proj_up_dim, bias=config.bias)
        self.proj_down = nn.Linear(config._proj_up_dim, config.embedding_dim, bias=config.bias)
        self.act_fn = _ACTIVATIONS[config.act_fn]
        self.dropout = nn.Dropout(config.dropout)
        self.reset_parameters()

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.proj_up(x).chunk(2, dim=-1)
        return self.dropout(self.proj_down(self.act_fn(gate) * up))

    def reset_parameters(self) -> None:
        small_init(self.proj_up.weight, self.config.embedding_dim)
        wang_init(self.proj_down.weight, self.config.embedding_dim, self.config._num_blocks)
        zero_bias(self.proj_up)
        zero_bias(self.proj_down)
