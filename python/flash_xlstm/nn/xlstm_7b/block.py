"""One residual block: the mLSTM layer, then the feed-forward layer, with a norm in front of each."""

from __future__ import annotations

from torch import Tensor, nn

from flash_xlstm.nn.packing import check_sequence
from flash_xlstm.nn.state import State
from flash_xlstm.nn.xlstm_7b import residual
from flash_xlstm.nn.xlstm_7b.block_step import block_step
from flash_xlstm.nn.xlstm_7b.feedforward import FeedForward
from flash_xlstm.nn.xlstm_7b.mlstm import mLSTMLayer
from flash_xlstm.nn.xlstm_7b.norm import RMSNorm


class mLSTMBlock(nn.Module):
    """``x += mlstm_layer(norm_mlstm(x)); x += ffn(norm_ffn(x))``.

    Args:
        hidden_size: size of input and output.
        mlstm_layer, ffn: the two layers. Their inputs and outputs have that size.
        norm_eps, use_bias: options of the two norms in front of the layers.
    """

    _again = False  # gradient checkpointing: the forward keeps little, the backward recomputes the rest

    def __init__(
        self,
        hidden_size: int,
        mlstm_layer: mLSTMLayer,
        ffn: FeedForward,
        *,
        norm_eps: float = 1e-6,
        use_bias: bool = False,
    ) -> None:
        super().__init__()
        self.hidden_size = hidden_size
        self.norm_mlstm = RMSNorm(hidden_size, norm_eps, use_bias=use_bias)
        self.mlstm_layer = mlstm_layer
        self.norm_ffn = RMSNorm(hidden_size, norm_eps, use_bias=use_bias)
        self.ffn = ffn

    def forward(
        self,
        x: Tensor,
        state: State | None = None,
        padding: Tensor | None = None,
        return_state: bool = False,
        inplace: bool = False,
        state_indices: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
    ) -> tuple[Tensor, State | None]:
        """As :meth:`mLSTMLayer.forward`."""
        if inplace and padding is None and state is not None and cu_seqlens is None:
            out = block_step(self, x, state, state_indices)
            if out is not None:
                return out, state if return_state else None
        check_sequence("x", x, self.hidden_size, step=False)
        if state is None and not return_state and state_indices is None and residual.serves(x):
            return self._train(x, padding, cu_seqlens), None
        y, state = self.mlstm_layer(
            self.norm_mlstm(x),
            state,
            padding,
            return_state=return_state,
            inplace=inplace,
            state_indices=state_indices,
            cu_seqlens=cu_seqlens,
        )
        normed, x = self.norm_ffn(y, x)
        return x + self.ffn(normed), state

    def _train(self, x: Tensor, padding: Tensor | None, cu_seqlens: Tensor | None) -> Tensor:
        """The forward for training, without states. Each half is one autograd function where possible."""
        mlstm, ffn = self._halves(x)
        if mlstm is not None:
            x = residual.run_mlstm(x, mlstm, padding, cu_seqlens, self._again)
            normed = None
        else:
            y, _ = self.mlstm_layer(self.norm_mlstm(x), None, padding, cu_seqlens=cu_seqlens)
            normed, x = self.norm_ffn(y, x) if ffn is None else (None, x + y)
        if ffn is not None:
            return residual.run_feed_forward(x, ffn, self._again)
        return x + self.ffn(self.norm_ffn(x) if normed is None else normed)

    def makes_again(self, x: Tensor) -> bool:
        """Whether both halves can keep little for the backward, and recompute the rest."""
        return residual.serves(x) and None not in self._halves(x)

    def _halves(self, x: Tensor) -> tuple[residual.MlstmHalf | None, residual.FeedForwardHalf | None]:
        """What the two halves run on. Tensor parallel replaces this method."""
        return residual.mlstm_half(self, x), residual.feed_forward_half(self, x)
