"""Layers that read a sequence in both directions."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from flash_xlstm.nn.block_stack.configuration import mLSTMLayerConfig, sLSTMLayerConfig
from flash_xlstm.nn.block_stack.mlstm import mLSTMLayer
from flash_xlstm.nn.block_stack.slstm import sLSTMLayer
from flash_xlstm.nn.packing import check_packed, check_padding, check_sequence, sequence_of_tokens, tokens_between
from flash_xlstm.ops._common import check_flag

MERGES = ("sum", "concat")


class _Bidirectional(nn.Module):
    """One layer for the sequence as it is, one for the sequence from its end; their outputs at a token are merged."""

    _layer: Any
    _config: Any

    def __init__(self, config: Any, *, shared_weights: bool = False, merge: str = "sum") -> None:
        super().__init__()
        if not isinstance(config, self._config):
            raise TypeError(f"config is a {type(config).__name__}; it must be an {self._config.__name__}")
        if merge not in MERGES:
            raise ValueError(f"merge is {merge!r}; it must be one of {', '.join(map(repr, MERGES))}")
        check_flag("shared_weights", shared_weights)
        self.config = config
        self.merge = merge
        self.forward_layer = self._layer(config)
        self.backward_layer = None if shared_weights else self._layer(config)

    def forward(self, x: Tensor, *, padding: Tensor | None = None, cu_seqlens: Tensor | None = None) -> Tensor:
        """A batch of whole sequences.

        Args:
            x: (batch, seq, embedding_dim).
            padding, cu_seqlens: as in :meth:`xLSTMBlockStack.forward`. Each row's tokens, or each packed sequence, are
                read from their own ends.

        Returns:
            (batch, seq, embedding_dim), or twice that width with `merge` "concat".

        Raises:
            TypeError, ValueError: as in :meth:`xLSTMBlockStack.forward`.
        """
        check_sequence("x", x, self.config.embedding_dim, step=False)
        index = None
        options: dict[str, Any] = {}
        if padding is not None:
            check_padding(padding, x, cu_seqlens)
            options["padding"] = padding
            index = _from_the_end_of_rows(padding)
        elif cu_seqlens is not None:
            check_packed(x, cu_seqlens)
            options["cu_seqlens"] = cu_seqlens
            index = _from_the_end_of_sequences(cu_seqlens, x.shape[1])
        flipped = _flip(x, index)
        if self.backward_layer is not None:
            forth, back = self.forward_layer(x, **options), self.backward_layer(flipped, **options)
        else:  # both directions in one call
            at = 0 if cu_seqlens is None else 1
            if padding is not None:
                options["padding"] = torch.cat([padding, padding])
            elif cu_seqlens is not None:
                options["cu_seqlens"] = torch.cat([cu_seqlens, cu_seqlens[1:] + x.shape[1]])
            forth, back = self.forward_layer(torch.cat([x, flipped], at), **options).chunk(2, at)
        back = _flip(back, index)
        return forth + back if self.merge == "sum" else torch.cat([forth, back], -1)

    def reset_parameters(self) -> None:
        for layer in (self.forward_layer, self.backward_layer):
            if layer is not None:
                layer.reset_parameters()

    def extra_repr(self) -> str:
        return f"shared_weights={self.backward_layer is None}, merge={self.merge!r}"


def _from_the_end_of_rows(padding: Tensor) -> Tensor:
    """For each place of all rows, one row after the other, the place of what belongs there. Padding stays in place."""
    first, count = tokens_between(padding)
    places = torch.arange(padding.shape[1], device=padding.device)
    index = torch.where(padding, places, 2 * first + count - 1 - places)
    return (index + padding.shape[1] * torch.arange(len(padding), device=padding.device)[:, None]).flatten()


def _from_the_end_of_sequences(cu_seqlens: Tensor, tokens: int) -> Tensor:
    starts, places = cu_seqlens.long(), torch.arange(tokens, device=cu_seqlens.device)
    sequence = sequence_of_tokens(starts, tokens)
    return starts[sequence] + starts[sequence + 1] - 1 - places


def _flip(x: Tensor, index: Tensor | None) -> Tensor:
    """The tokens of each sequence in the opposite order, which undoes itself."""
    return x.flip(1) if index is None else x.flatten(0, 1).index_select(0, index).view_as(x)


class BiMLSTM(_Bidirectional):
    """An :class:`mLSTMLayer` in both directions.

    Args:
        config: of each direction's layer, with `embedding_dim` set.
        shared_weights: whether one layer, ``forward_layer``, reads both directions. It reads them in one call. Else
            ``backward_layer`` has weights of its own.
        merge: "sum" of both outputs, or "concat": the forward direction's features, then the other's.

    It has no state and no ``step``: a token's output depends on all tokens behind it. With `merge` "sum" it can take
    the layer's place in an :class:`xLSTMBlock`.

    Shape: (batch, seq, embedding_dim) in; the same out, or (batch, seq, 2 * embedding_dim) with "concat".

    Raises:
        TypeError, ValueError: an argument is not as above.
    """

    _layer, _config = mLSTMLayer, mLSTMLayerConfig


class BiSLSTM(_Bidirectional):
    """An :class:`sLSTMLayer` in both directions. Arguments, shapes and errors are those of :class:`BiMLSTM`."""

    _layer, _config = sLSTMLayer, sLSTMLayerConfig
