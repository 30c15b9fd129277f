"""Residual blocks, and stacks that mix them: xLSTM[a:b] (arXiv 2405.04517, section 2.4)."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from flash_xlstm.nn.block_stack.bidirectional import BiMLSTM, BiSLSTM
from flash_xlstm.nn.block_stack.configuration import mLSTMBlockConfig, sLSTMBlockConfig, xLSTMBlockStackConfig
from flash_xlstm.nn.block_stack.layers import GatedFeedForward, LayerNorm
from flash_xlstm.nn.block_stack.mlstm import LayerState, mLSTMLayer
from flash_xlstm.nn.block_stack.slstm import sLSTMLayer
from flash_xlstm.nn.packing import check_packed, check_padding, check_sequence

StackState = dict[str, LayerState]


class xLSTMBlock(nn.Module):
    """``x += xlstm(norm(x))``, then ``x += ffn(norm(x))`` if there is a feed-forward layer.

    Args:
        xlstm: the layer around the cell. A bidirectional one must have `merge` "sum".
        ffn: the feed-forward layer, or None.

    Shape: (batch, seq, embedding_dim) in and out.
    """

    def __init__(self, xlstm: mLSTMLayer | sLSTMLayer | BiMLSTM | BiSLSTM, ffn: GatedFeedForward | None = None) -> None:
        super().__init__()
        self.embedding_dim = width = xlstm.config.embedding_dim
        self.xlstm_norm = LayerNorm(width)
        self.xlstm = xlstm
        self.ffn_norm = LayerNorm(width) if ffn is not None else None
        self.ffn = ffn
        self.reset_parameters()

    def forward(self, x: Tensor, return_last_state: bool = False, **state: Any) -> Tensor | tuple[Tensor, LayerState]:
        """Reads a sequence. `state`, `inplace`, `cu_seqlens`, `padding` and results are as in the layer's forward."""
        check_sequence("x", x, self.embedding_dim, step=state.get("inplace", False))  # the norm checks the width
        if not return_last_state:
            return self._feed_forward(x + self.xlstm(self.xlstm_norm(x), **state))
        y, after = self.xlstm(self.xlstm_norm(x), return_last_state=True, **state)
        return self._feed_forward(x + y), after

    def step(self, x: Tensor, **state: Any) -> tuple[Tensor, LayerState]:
        """Reads one token. `state`, `padding`, results and errors are as in the layer's ``step``."""
        check_sequence("x", x, self.embedding_dim, step=True)
        options = {} if torch.is_grad_enabled() else {"inplace": True}
        return self(x, return_last_state=True, **options, **state)

    def _feed_forward(self, x: Tensor) -> Tensor:
        return x if self.ffn is None or self.ffn_norm is None else x + self.ffn(self.ffn_norm(x))

    def reset_parameters(self) -> None:
        for layer in (self.xlstm_norm, self.xlstm, self.ffn_norm, self.ffn):
            if layer is not None:
                layer.reset_parameters()


def _check_state(name: str, block: nn.Module, state: StackState) -> None:
    """Refuses a stack's state without the part of this block. A part that is left out would be taken as fresh."""
    if name not in state:
        raise ValueError(f"state has no {name}; it must hold the state of every block, or be empty")
    given = state[name]
    if not isinstance(given, dict):
        raise TypeError(f"state holds a {type(given).__name__} as {name}; it must be a dict")
    layer = getattr(block, "xlstm", None)
    if not isinstance(layer, (mLSTMLayer, sLSTMLayer)):
        return  # another module, whose state is its own affair
    # Without a convolution conv_state is None, which a file of tensors cannot hold.
    parts = ["mlstm_state" if isinstance(layer, mLSTMLayer) else "slstm_state"]
    for part in [*parts, "conv_state"] if layer.config.conv1d_kernel_size else parts:
        if part not in given:
            raise ValueError(f"state holds {name} without {part}; it must hold all that return_last_state gives")


class mLSTMBlock(xLSTMBlock):
    """The residual block of an :class:`mLSTMLayer`, which projects up before the cell."""

    def __init__(self, config: mLSTMBlockConfig) -> None:
        super().__init__(mLSTMLayer(config.mlstm))
        self.config = config


class sLSTMBlock(xLSTMBlock):
    """The residual block of an :class:`sLSTMLayer`, with the up-projection after it in the feed-forward layer."""

    def __init__(self, config: sLSTMBlockConfig) -> None:
        ffn = None if config.feedforward is None else GatedFeedForward(config.feedforward)
        super().__init__(sLSTMLayer(config.slstm), ffn)
        self.config = config


class xLSTMBlockStack(nn.Module):
    """A stack of blocks, in place of a stack of Transformer blocks.

    Parameters have the names, shapes and layout of NX-AI's ``xlstm.xLSTMBlockStack``, so that either loads the other's
    state dict.

    Args:
        config: of the blocks.

    Shape: (batch, seq, embedding_dim) in and out; seq may be any length.
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
        padding: Tensor | None = None,
    ) -> Tensor | tuple[Tensor, StackState]:
        """A sequence.

        Args:
            x: (batch, seq, embedding_dim).
            state: a whole state that an earlier call or :meth:`step` returned, in any float dtype; default: fresh, as
                is an empty one.
            return_last_state: also return the state after it.
            inplace: update the given state; for one token without gradients (:meth:`step`).
            cu_seqlens: (num_seqs + 1,) int32 offsets of packed sequences, as in :func:`flash_xlstm.ops.mlstm`. Batch
                must be 1. Sequences do not see each other, as if each were a row of its own. States have num_seqs in
                place of batch. A module that replaces a block must take it.
            padding: (batch, seq) bool, True at tokens that are not there: on the left and right of a row's tokens, not
                between them, and not beside `cu_seqlens`. Tokens, states and gradients are those of the row without
                padding. The output at padding is finite and has no meaning. A module that replaces a block must take
                it.

        Returns:
            (batch, seq, embedding_dim); with `return_last_state`, a pair of it and ``{"block_0": ..., ...}``. The given
            state is unchanged unless `inplace`.

        Raises:
            TypeError, ValueError: x, `state`, `cu_seqlens` or `padding` is not as above. On CUDA nothing waits for the
                values of `cu_seqlens` and `padding`: the device raises for wrong ones.
        """
        names = [f"block_{index}" for index in range(len(self.blocks))]
        before, after = {} if state is None else state, {}
        if not isinstance(before, dict):
            raise TypeError(f"state is a {type(before).__name__}; it must be a dict, as return_last_state gives it")
        if before and not before.keys() <= set(names):
            raise ValueError(f"state holds {', '.join(map(str, before))}; this stack's blocks are {', '.join(names)}")
        if before:
            for name, block in zip(names, self.blocks, strict=True):
                _check_state(name, block, before)
        # Any module that takes x alone may replace a block.
        options: dict[str, Any] = {"inplace": True} if inplace else {}
        if cu_seqlens is not None:
            check_sequence("x", x, self.config.embedding_dim, step=inplace)
            check_packed(x, cu_seqlens)
            options["cu_seqlens"] = cu_seqlens
        if padding is not None:
            check_sequence("x", x, self.config.embedding_dim, step=inplace)
            check_padding(padding, x, cu_seqlens)
            options["padding"] = padding
        for name, block in zip(names, self.blocks, strict=True):
            if return_last_state:
                x, after[name] = block(x, return_last_state=True, **options, **before.get(name, {}))
            else:
                x = block(x, **options, **before.get(name, {}))
        x = self.post_blocks_norm(x)
        return (x, after) if return_last_state else x

    def step(
        self, x: Tensor, state: StackState | None = None, *, padding: Tensor | None = None
    ) -> tuple[Tensor, StackState]:
        """Reads one token, (batch, 1, embedding_dim). Returns the output and the state after it. Rows where `padding`
        (batch, 1) is True keep their state.

        Without gradients the tensors of `state` are updated in place. Copy them to continue from the same state twice.
        A tensor that does not fit this call is cast, and the copy is updated; continue with the returned state. Fitting
        tensors are contiguous and on the device of x. mLSTM and sLSTM states are float32 (float64 in a float64 model; c
        may be bfloat16). Convolutions' states have the dtype of the layer's activations. With gradients enabled the
        tensors of `state` are unchanged.

        Raises:
            ValueError: x holds several tokens, or has another width. The state is unchanged.
        """
        check_sequence("x", x, self.config.embedding_dim, step=True)
        options: dict[str, Any] = {"inplace": not torch.is_grad_enabled(), "padding": padding}
        return self(x, state, return_last_state=True, **options)

    def reset_parameters(self) -> None:
        for block in self.blocks:
            block.reset_parameters()
        if isinstance(self.post_blocks_norm, LayerNorm):
            self.post_blocks_norm.reset_parameters()
