"""The mLSTM layer with its projections around it (arXiv 2405.04517, figure 10)."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flash_xlstm import ops, reference
from flash_xlstm.nn.block_stack.configuration import mLSTMLayerConfig
from flash_xlstm.nn.block_stack.layers import (
    CausalConv1d,
    LinearHeadwiseExpand,
    MultiHeadLayerNorm,
    small_init,
    wang_init,
    zero_bias,
)
from flash_xlstm.nn.packing import check_padding, check_sequence, closed, refuse_step
from flash_xlstm.nn.state import fitting_state
from flash_xlstm.ops import MlstmState

LayerState = dict[str, "Tensor | tuple[Tensor, ...] | None"]


class mLSTMCell(nn.Module):
    """The gates' projections of q, k and v, then the mLSTM, then the head-wise norm.

    Shape: q, k, v (batch, seq, features) in, (batch, seq, features) out.
    """

    def __init__(self, features: int, num_heads: int) -> None:
        super().__init__()
        self.features = features
        self.num_heads = num_heads
        self.igate = nn.Linear(3 * features, num_heads)
        self.fgate = nn.Linear(3 * features, num_heads)
        self.outnorm = MultiHeadLayerNorm(features)
        self.reset_parameters()

    def forward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        state: MlstmState | None = None,
        *,
        return_state: bool = False,
        inplace: bool = False,
        cu_seqlens: Tensor | None = None,
        padding: Tensor | None = None,
    ) -> tuple[Tensor, MlstmState | None]:
        """`state` may be of any float dtype. `inplace` is for one token without gradients. It updates float32 tensors
        of `state` (c also in bfloat16, all in float64 if x is float64), and copies of others. `cu_seqlens` and
        `padding` are as in :meth:`xLSTMBlockStack.forward`."""
        refuse_step(inplace, cu_seqlens)
        check_sequence("q", q, self.features, step=inplace)
        check_sequence("k", k, self.features, step=inplace)
        check_sequence("v", v, self.features, step=inplace)
        gate_input = torch.cat([q, k, v], dim=-1)
        if padding is not None:
            check_padding(padding, q, cu_seqlens)
        i, f = closed(self.igate(gate_input), self.fgate(gate_input), padding)
        q, k, v = (t.unflatten(-1, (self.num_heads, self.features // self.num_heads)) for t in (q, k, v))
        wide = q.dtype == torch.float64
        if state is not None:
            state = fitting_state(state, q, written=inplace)
        if inplace:
            if state is None:
                state = self._zero_state(q)
            step = reference.mlstm_step if wide else ops.mlstm_step
            h = step(q[:, 0], k[:, 0], v[:, 0], i[:, 0], f[:, 0], state)[:, None]
        elif return_state:
            sequence = reference.mlstm_chunkwise if wide else ops.mlstm
            h, state = sequence(q, k, v, i, f, initial_state=state, cu_seqlens=cu_seqlens, return_final_state=True)
        else:
            sequence = reference.mlstm_chunkwise if wide else ops.mlstm
            h = sequence(q, k, v, i, f, initial_state=state, cu_seqlens=cu_seqlens)
        return self.outnorm(h), state

    @staticmethod
    def _zero_state(q: Tensor) -> MlstmState:
        batch, _, heads, dim = q.shape
        dtype = torch.promote_types(q.dtype, torch.float32)
        c, n, m = (torch.zeros(batch, heads, *s, dtype=dtype, device=q.device) for s in ((dim, dim), (dim,), ()))
        return c, n, m

    def reset_parameters(self) -> None:
        self.outnorm.reset_parameters()
        nn.init.zeros_(self.igate.weight)
        nn.init.zeros_(self.fgate.weight)
        nn.init.normal_(self.igate.bias, std=0.1)
        with torch.no_grad():
            self.fgate.bias.copy_(torch.linspace(3.0, 6.0, self.num_heads))


class mLSTMLayer(nn.Module):
    """Up-projection to two halves, then a down-projection of their product. One half passes the convolution, the
    block-diagonal q, k and v, and the mLSTM with a learnable skip. The other half is the output gate.

    Args:
        config: with `embedding_dim` set.

    Shape: (batch, seq, embedding_dim) in and out.
    """

    def __init__(self, config: mLSTMLayerConfig) -> None:
        super().__init__()
        self.config = config
        width, inner, bias = config.embedding_dim, config._inner_embedding_dim, config.bias
        if width < 1:
            raise ValueError(f"embedding_dim is {width}; it must be at least 1")
        blocks = inner // config.qkv_proj_blocksize
        self.proj_up = nn.Linear(width, 2 * inner, bias=bias)
        self.q_proj = LinearHeadwiseExpand(inner, blocks, bias=bias)
        self.k_proj = LinearHeadwiseExpand(inner, blocks, bias=bias)
        self.v_proj = LinearHeadwiseExpand(inner, blocks, bias=bias)
        self.conv1d = CausalConv1d(inner, config.conv1d_kernel_size)
        self.mlstm_cell = mLSTMCell(inner, config.num_heads)
        self.learnable_skip = nn.Parameter(torch.ones(inner))
        self.proj_down = nn.Linear(inner, width, bias=bias)
        self.dropout = nn.Dropout(config.dropout)
        self.reset_parameters()

    def forward(
        self,
        x: Tensor,
        mlstm_state: MlstmState | None = None,
        conv_state: Tensor | None = None,
        return_last_state: bool = False,
        *,
        inplace: bool = False,
        cu_seqlens: Tensor | None = None,
        padding: Tensor | None = None,
    ) -> Tensor | tuple[Tensor, LayerState]:
        """A sequence.

        Args:
            x: (batch, seq, embedding_dim).
            mlstm_state: ``(c, n, m)`` before it, as :func:`flash_xlstm.ops.mlstm` takes it, in any float dtype;
                default: fresh.
            conv_state: (batch, conv1d_kernel_size - 1, inner width) inputs of the convolution before it, in any float
                dtype.
            return_last_state: also return both after it.
            inplace: update the given states; for one token without gradients (:meth:`step`).
            cu_seqlens, padding: packed sequences, or padding, as in :meth:`xLSTMBlockStack.forward`.

        Returns:
            (batch, seq, embedding_dim); with `return_last_state`, a pair of it and ``{"mlstm_state": ..., "conv_state":
            ...}``.
        """
        check_sequence("x", x, self.config.embedding_dim, step=inplace)
        inner, z = self.proj_up(x).chunk(2, dim=-1)
        options: dict[str, Any] = {
            "return_state": return_last_state, "inplace": inplace, "cu_seqlens": cu_seqlens, "padding": padding,
        }  # fmt: skip
        conv, conv_state = self.conv1d(inner, conv_state, **options)
        q, k, v = self.q_proj(conv), self.k_proj(conv), self.v_proj(inner)
        h, mlstm_state = self.mlstm_cell(q, k, v, mlstm_state, **options)
        y = self.dropout(self.proj_down((h + self.learnable_skip * conv) * F.silu(z)))
        return (y, {"mlstm_state": mlstm_state, "conv_state": conv_state}) if return_last_state else y

    def step(
        self,
        x: Tensor,
        mlstm_state: MlstmState | None = None,
        conv_state: Tensor | None = None,
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
        # A call, which honours hooks, another forward and offloaded parameters.
        options: dict[str, Any] = {"inplace": not torch.is_grad_enabled(), "padding": padding}
        return self(x, mlstm_state, conv_state, return_last_state=True, **options)

    def reset_parameters(self) -> None:
        """Initializes as NX-AI's package does, which does not reset the convolution."""
        width = self.config.embedding_dim
        small_init(self.proj_up.weight, width)
        wang_init(self.proj_down.weight, width, self.config._num_blocks)
        zero_bias(self.proj_up)
        zero_bias(self.proj_down)
        nn.init.ones_(self.learnable_skip)
        for proj in (self.q_proj, self.k_proj, self.v_proj):
            proj.reset_parameters(width)
        self.mlstm_cell.reset_parameters()
