"""The sLSTM layer (arXiv 2405.04517, figure 9)."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from flash_xlstm import ops, reference
from flash_xlstm.nn.block_stack.configuration import sLSTMLayerConfig
from flash_xlstm.nn.block_stack.layers import CausalConv1d, LinearHeadwiseExpand, MultiHeadLayerNorm
from flash_xlstm.nn.block_stack.mlstm import LayerState
from flash_xlstm.nn.packing import check_padding, check_sequence, closed, refuse_step
from flash_xlstm.nn.state import fitting
from flash_xlstm.ops import SlstmState
from flash_xlstm.ops._common import unpack_state

_GATES = 4  # i, f, z, o
_NOTHING = torch.finfo(torch.float32).tiny  # the op refuses a bound of 0


def _recurrent_shape(layout: str, heads: int, dim: int) -> tuple[int, int, int]:
    return (heads, _GATES * dim, dim) if layout == "vanilla" else (heads, dim, _GATES * dim)


def _weights_of_op(layout: str, kernel: Tensor, bias: Tensor, heads: int, dim: int) -> tuple[Tensor, Tensor]:
    """Views of a layout in the form of :func:`flash_xlstm.ops.slstm`: R (gates, heads, out, in), b (gates, heads,
    dim)."""
    if layout == "vanilla":  # kernel (heads, gates * out, in), bias (gates * heads * dim,)
        return kernel.view(heads, _GATES, dim, dim).transpose(0, 1), bias.view(_GATES, heads, dim)
    return kernel.view(heads, dim, _GATES, dim).permute(2, 0, 3, 1), bias.view(heads, _GATES, dim).transpose(0, 1)


def _to_layout(layout: str, R: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """The inverse of :func:`_weights_of_op`."""
    heads, dim = R.shape[1], R.shape[2]
    shape = _recurrent_shape(layout, heads, dim)
    if layout == "vanilla":
        return R.transpose(0, 1).reshape(shape), b.reshape(-1)
    return R.permute(1, 3, 0, 2).reshape(shape), b.transpose(0, 1).reshape(-1)


class sLSTMCell(nn.Module):
    """The recurrence and its weights.

    NX-AI's package, and its checkpoints, keep the recurrent weights in the layout of the configured backend. The
    parameters here have the same names, shapes and layout:

    =========  ============================  =================================
    backend    ``_recurrent_kernel_``        ``_bias_``
    =========  ============================  =================================
    vanilla    (heads, gates x out, in)      (gates x heads x out,)
    cuda       (heads, in, gates x out)      (heads x gates x out,)
    =========  ============================  =================================

    ``load_state_dict`` accepts both layouts, which differ in the shape of the recurrent weights.

    Shape: x (batch, seq, 4 * embedding_dim) in, the gates concatenated in the order i, f, z, o; (batch, seq, heads,
    head_dim) out.
    """

    def __init__(self, config: sLSTMLayerConfig) -> None:
        super().__init__()
        self.config = config
        heads, dim = config.num_heads, config.head_dim
        self._recurrent_kernel_ = nn.Parameter(torch.empty(_recurrent_shape(config.backend, heads, dim)))
        self._bias_ = nn.Parameter(torch.empty(_GATES * heads * dim))
        self._clip = _NOTHING if config.gradient_recurrent_cut else config.gradient_recurrent_clipval
        self.register_load_state_dict_pre_hook(_convert_on_load)
        self.reset_parameters()

    def weights(self) -> tuple[Tensor, Tensor]:
        """R (4, heads, out, in) and b (4, heads, dim), views of the parameters. The gates' order is i, f, z, o."""
        config = self.config
        return _weights_of_op(config.backend, self._recurrent_kernel_, self._bias_, config.num_heads, config.head_dim)

    def forward(
        self,
        x: Tensor,
        state: SlstmState | None = None,
        *,
        return_state: bool = False,
        inplace: bool = False,
        cu_seqlens: Tensor | None = None,
    ) -> tuple[Tensor, SlstmState | None]:
        """`state` may be of any float dtype. `inplace` is for one token without gradients. It updates float32 tensors
        of `state` (float64 if x is float64), and copies of others."""
        refuse_step(inplace, cu_seqlens)
        check_sequence("x", x, _GATES * self.config.embedding_dim, step=inplace)
        x = x.unflatten(-1, (_GATES, self.config.num_heads, self.config.head_dim))
        wide = torch.promote_types(x.dtype, torch.float32)
        if state is not None:
            h, c, n, m = fitting(unpack_state("state", state, "h, c, n, m"), x, (wide,) * 4, written=inplace)
            state = h, c, n, m
        R, b = self.weights()
        namespace = reference if x.dtype == torch.float64 else ops
        if inplace:
            if state is None:
                h, c, n, m = (torch.zeros_like(x[:, 0, 0], dtype=wide) for _ in range(4))
                state = h, c, n, m
            return namespace.slstm_step(x[:, 0], R, b, state)[:, None], state
        result = namespace.slstm(
            x, R, b, initial_state=state, cu_seqlens=cu_seqlens, return_final_state=return_state,
            recurrent_grad_clip=self._clip,
        )  # fmt: skip
        return result if return_state else (result, None)

    @torch.no_grad()
    def reset_parameters(self) -> None:
        config = self.config
        R, b = self.weights()
        bound = 1 / math.sqrt(config.embedding_dim)
        nn.init.zeros_(R)
        nn.init.zeros_(b)
        if config.recurrent_weight_init == "standard":
            R.uniform_(-bound, bound)
        if config.bias_init == "standard":
            b.uniform_(-bound, bound)
        elif config.bias_init == "small_init":
            b[1] = torch.linspace(3.0, 6.0, config.head_dim)
        elif config.bias_init == "powerlaw_blockdependent":
            # From 5 down to -7 over a head's units. Deeper blocks get more units with long memory.
            last_block, last_unit = max((config._num_blocks or 1) - 1, 1), max(config.head_dim - 1, 1)
            depth = (config._block_idx or 0) / last_block
            b[1] = 5.0 - 12.0 * (torch.arange(config.head_dim) / last_unit) ** (0.3 + 1.3 * depth)

    def extra_repr(self) -> str:
        config = self.config
        return f"{config.embedding_dim}, num_heads={config.num_heads}, backend={config.backend!r}"


def _convert_on_load(module: nn.Module, state_dict: dict[str, Tensor], prefix: str, *args: Any) -> None:
    assert isinstance(module, sLSTMCell)
    names = [f"{prefix}_recurrent_kernel_", f"{prefix}_bias_"]
    if not all(name in state_dict for name in names):
        return
    kernel, bias = (state_dict[name] for name in names)
    heads, dim, own = module.config.num_heads, module.config.head_dim, module.config.backend
    other = "cuda" if own == "vanilla" else "vanilla"
    if kernel.shape == _recurrent_shape(other, heads, dim) and bias.numel() == _GATES * heads * dim:
        converted = _to_layout(own, *_weights_of_op(other, kernel, bias, heads, dim))
        state_dict.update(zip(names, converted, strict=True))


class sLSTMLayer(nn.Module):
    """Convolution before two of the gates, block-diagonal gate projections, sLSTM, head-wise norm.

    Args:
        config: with `embedding_dim` set.

    Shape: (batch, seq, embedding_dim) in and out.
    """

    def __init__(self, config: sLSTMLayerConfig) -> None:
        super().__init__()
        self.config = config
        width = config.embedding_dim
        if width < 1:
            raise ValueError(f"embedding_dim is {width}; it must be at least 1")
        if config.conv1d_kernel_size:
            self.conv1d = CausalConv1d(width, config.conv1d_kernel_size)
        self.fgate = LinearHeadwiseExpand(width, config.num_heads)
        self.igate = LinearHeadwiseExpand(width, config.num_heads)
        self.zgate = LinearHeadwiseExpand(width, config.num_heads)
        self.ogate = LinearHeadwiseExpand(width, config.num_heads)
        self.slstm_cell = sLSTMCell(config)
        self.group_norm = MultiHeadLayerNorm(width, weight=config.group_norm_weight)
        self.dropout = nn.Dropout(config.dropout)

    def forward(
        self,
        x: Tensor,
        conv_state: Tensor | None = None,
        slstm_state: SlstmState | None = None,
        return_last_state: bool = False,
        *,
        inplace: bool = False,
        cu_seqlens: Tensor | None = None,
        padding: Tensor | None = None,
    ) -> Tensor | tuple[Tensor, LayerState]:
        """A sequence.

        Args:
            x: (batch, seq, embedding_dim).
            conv_state: (batch, conv1d_kernel_size - 1, embedding_dim) inputs before it, in any float dtype; default:
                zeros.
            slstm_state: ``(h, c, n, m)`` before it, as :func:`flash_xlstm.ops.slstm` takes it, in any float dtype;
                default: fresh.
            return_last_state: also return both after it.
            inplace: update the given states; for one token without gradients (:meth:`step`).
            cu_seqlens, padding: packed sequences, or padding, as in :meth:`xLSTMBlockStack.forward`.

        Returns:
            (batch, seq, embedding_dim); with `return_last_state`, a pair of it and ``{"conv_state": ..., "slstm_state":
            ...}``.
        """
        check_sequence("x", x, self.config.embedding_dim, step=inplace)
        options: dict[str, Any] = {"return_state": return_last_state, "inplace": inplace, "cu_seqlens": cu_seqlens}
        conv = x
        if padding is not None:
            check_padding(padding, x, cu_seqlens)
        if self.config.conv1d_kernel_size:
            conv, conv_state = self.conv1d(x, conv_state, padding=padding, **options)
        # In NX-AI's package and checkpoints `fgate` projects to the recurrence's input gate, and `igate` to its forget
        # gate.
        i, f = closed(self.fgate(conv), self.igate(conv), padding)
        gates = torch.cat([i, f, self.zgate(x), self.ogate(x)], dim=-1)
        h, slstm_state = self.slstm_cell(gates, slstm_state, **options)
        y = self.group_norm(self.dropout(h))
        return (y, {"conv_state": conv_state, "slstm_state": slstm_state}) if return_last_state else y

    def step(
        self,
        x: Tensor,
        conv_state: Tensor | None = None,
        slstm_state: SlstmState | None = None,
        *,
        padding: Tensor | None = None,
    ) -> tuple[Tensor, LayerState]:
        """Reads one token, (batch, 1, embedding_dim). Returns the output and the states after it. Without gradients the
        given states are updated in place, unless they have to be cast (:class:`xLSTMBlockStack`). With gradients
        enabled they are unchanged, and new ones are returned. Rows where `padding` (batch, 1) is True keep theirs.

        Raises:
            ValueError: x holds several tokens, or has another width.
        """
        check_sequence("x", x, self.config.embedding_dim, step=True)
        options: dict[str, Any] = {"inplace": not torch.is_grad_enabled(), "padding": padding}
        return self(x, conv_state, slstm_state, return_last_state=True, **options)

    def reset_parameters(self) -> None:
        """Initializes as NX-AI's package does, which does not reset the convolution."""
        self.slstm_cell.reset_parameters()
        self.group_norm.reset_parameters()
        for gate in (self.igate, self.fgate, self.zgate, self.ogate):
            gate.reset_parameters(self.config.embedding_dim)
