"""Residual blocks, and stacks that mix them: xLSTM[a:b] (arXiv 2405.04517, section 2.4)."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from flash_xlstm.nn.block_stack.configuration import mLSTMBlockConfig, sLSTMBlockConfig, xLSTMBlockStackConfig
from flash_xlstm.nn.block_stack.layers import GatedFeedForward, LayerNorm, check_sequence
from flash_xlstm.nn.block_stack.mlstm import LayerState, mLSTMLayer
from flash_xlstm.nn.block_stack.slstm import sLSTMLayer
from flash_xlstm.nn.packing import check_offsets

StackState = dict[str, LayerState]


class xLSTMBlock(nn.Module):
    """``x += xlstm(norm(x))``, then, where there is a feed-forward layer, ``x += ffn(norm(x))``.

    Shape: (batch, seq, embedding_dim) in and out.
    """

    def __init__(self, xlstm: mLSTMLayer | sLSTMLayer, ffn: GatedFeedForward | None = None) -> None:
        super().__init__()
        self.embedding_dim = width = xlstm.config.embedding_dim
        self.xlstm_norm = LayerNorm(width)
        self.xlstm = xlstm
        self.ffn_norm = LayerNorm(width) if ffn is not None else None
        self.ffn = ffn
        self.reset_parameters()

    def forward(self, x: Tensor, return_last_state: bool = False, **state: Any) -> Tensor | tuple[Tensor, LayerState]:
        """A sequence; `state`, `inplace` and `cu_seqlens` with it, and results as the layer's ``forward``."""
        check_sequence("x", x, self.embedding_dim, step=state.get("inplace", False))  # the norm looks at the width
        if not return_last_state:
            return self._feed_forward(x + self.xlstm(self.xlstm_norm(x), **state))
        y, after = self.xlstm(self.xlstm_norm(x), return_last_state=True, **state)
        return self._feed_forward(x + y), after

    def step(self, x: Tensor, **state: Any) -> tuple[Tensor, LayerState]:
        """One token; `state`, results and errors as the layer's ``step``."""
        check_sequence("x", x, self.embedding_dim, step=True)
        options = {} if torch.is_grad_enabled() else {"inplace": True}
        return self(x, return_last_state=True, **options, **state)

    def _feed_forward(self, x: Tensor) -> Tensor:
        return x if self.ffn is None or self.ffn_norm is None else x + self.ffn(self.ffn_norm(x))

    def reset_parameters(self) -> None:
        for layer in (self.xlstm_norm, self.xlstm, self.ffn_norm, self.ffn):
            if layer is not None:
                layer.reset_parameters()


class mLSTMBlock(xLSTMBlock):
    """The residual block of an :class:`mLSTMLayer`: pre up-projection."""

    def __init__(self, config: mLSTMBlockConfig) -> None:
        super().__init__(mLSTMLayer(config.mlstm))
        self.config = config


class sLSTMBlock(xLSTMBlock):
    """The residual block of an :class:`sLSTMLayer`: post up-projection in its feed-forward layer."""

    def __init__(self, config: sLSTMBlockConfig) -> None:
        ffn = None if config.feedforward is None else GatedFeedForward(config.feedforward)
        super().__init__(sLSTMLayer(config.slstm), ffn)
        self.config = config


class xLSTMBlockStack(nn.Module):
    """Blocks in a row, in place of a stack of Transformer blocks.

    Parameters have the names, shapes and layout of NX-AI's ``xlstm.xLSTMBlockStack``: state dicts fit both ways.

    Args:
        config: which blocks, and of what.

    Shape: (batch, seq, embedding_dim) in and out; seq is bounded by nothing.
    """

    def __init__(self, config: xLSTMBlockStackConfig) -> None:
        super().__init__()
        self.config = config
        self.blocks = nn.ModuleList(self._block(index, kind) for index, kind in enumerate(config.block_map))
        self.post_blocks_norm = LayerNorm(config.embedding_dim) if config.add_post_blocks_norm else nn.Identity()

    def _block(self, index: int, kind: int) -> xLSTMBlock:
        config = copy.deepcopy(self.config.slstm_block if kind else self.config.mlstm_block)
        assert config is not None
        config._block_idx = index
        config.__post_init__()
        return sLSTMBlock(config) if isinstance(config, sLSTMBlockConfig) else mLSTMBlock(config)

    def forward(
        self,
        x: Tensor,
        state: StackState | None = None,
        return_last_state: bool = False,
        *,
        inplace: bool = False,
        cu_seqlens: Tensor | None = None,
    ) -> Tensor | tuple[Tensor, StackState]:
        """A sequence.

        Args:
            x: (batch, seq, embedding_dim).
            state: what an earlier call or :meth:`step` returned, in any float dtype; default: fresh.
            return_last_state: also return the state after it.
            inplace: for one token where no gradient is needed: update the state given (:meth:`step`).
            cu_seqlens: (num_seqs + 1,) int32 offsets of packed sequences, as in :func:`flash_xlstm.ops.mlstm`: batch
                must be 1, and sequences do not see each other, as if each were a row of its own. States have num_seqs
                in place of batch. Blocks that are replaced must take it.

        Returns:
            (batch, seq, embedding_dim); with `return_last_state`, that and ``{"block_0": ..., ...}``. The state given
            is left alone unless `inplace`.

        Raises:
            TypeError, ValueError: x or `cu_seqlens` is not as above. The values of `cu_seqlens` are not waited for on
                CUDA: the device raises for wrong ones.
        """
        before, after = state or {}, {}
        # Any module that takes x alone can stand in a block's place.
        options: dict[str, Any] = {"inplace": True} if inplace else {}
        if cu_seqlens is not None:
            check_sequence("x", x, self.config.embedding_dim, step=inplace)
            if x.shape[0] != 1:
                raise ValueError(f"x has batch {x.shape[0]}; with cu_seqlens it must be 1")
            check_offsets("cu_seqlens", cu_seqlens, x.shape[1])
            options["cu_seqlens"] = cu_seqlens
        for index, block in enumerate(self.blocks):
            name = f"block_{index}"
            if return_last_state:
                x, after[name] = block(x, return_last_state=True, **options, **before.get(name, {}))
            else:
                x = block(x, **options, **before.get(name, {}))
        x = self.post_blocks_norm(x)
        return (x, after) if return_last_state else x

    def step(self, x: Tensor, state: StackState | None = None) -> tuple[Tensor, StackState]:
        """One token, (batch, 1, embedding_dim), and the state after it.

        Without gradients the tensors of `state` are updated in place: copy them to go on from the same state twice.
        Those that do not fit this call are cast first, and copies are updated: mLSTM and sLSTM states are float32
        (float64 in a float64 model; c may be bfloat16), those of convolutions have the dtype of the layer's
        activations, all are contiguous and on the device of x. So go on with the state that is returned. With
        gradients enabled the tensors of `state` are left alone.

        Raises:
            ValueError: x holds several tokens, or is of another width; nothing has been updated.
        """
        check_sequence("x", x, self.config.embedding_dim, step=True)
        return self(x, state, return_last_state=True, inplace=not torch.is_grad_enabled())

    def reset_parameters(self) -> None:
        for block in self.blocks:
            block.reset_parameters()
        if isinstance(self.post_blocks_norm, LayerNorm):
            self.post_blocks_norm.reset_parameters()
