"""The xLSTM language model of arXiv 2405.04517."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from flash_xlstm.nn.block_stack.configuration import xLSTMLMModelConfig
from flash_xlstm.nn.block_stack.layers import small_init
from flash_xlstm.nn.block_stack.stack import StackState, xLSTMBlockStack


class xLSTMLMModel(nn.Module):
    """Embedding, :class:`xLSTMBlockStack`, output layer.

    Parameters have the names, shapes and layout of NX-AI's ``xlstm.xLSTMLMModel``. The embedding and the output layer
    have torch's initialization until :meth:`reset_parameters` is called, as in NX-AI's.

    Args:
        config: with `vocab_size` set.

    Shape: (batch, seq) token ids in, (batch, seq, vocab_size) logits out.
    """

    def __init__(self, config: xLSTMLMModelConfig) -> None:
        super().__init__()
        self.config = config
        self.xlstm_block_stack = xLSTMBlockStack(config)
        self.token_embedding = nn.Embedding(config.vocab_size, config.embedding_dim)
        self.emb_dropout = nn.Dropout(config.dropout) if config.add_embedding_dropout else nn.Identity()
        self.lm_head = nn.Linear(config.embedding_dim, config.vocab_size, bias=False)
        if config.tie_weights:
            self.lm_head.weight = self.token_embedding.weight

    def forward(
        self,
        idx: Tensor,
        state: StackState | None = None,
        return_last_state: bool = False,
        *,
        inplace: bool = False,
        cu_seqlens: Tensor | None = None,
        padding: Tensor | None = None,
    ) -> Tensor | tuple[Tensor, StackState]:
        """Logits of a sequence; `state`, `return_last_state`, `inplace`, `cu_seqlens` and `padding` as in
        :meth:`xLSTMBlockStack.forward`. idx at padding is any token.

        Raises:
            ValueError: idx is not (batch, seq), or as :meth:`xLSTMBlockStack.forward`.
        """
        if idx.dim() != 2:
            raise ValueError(f"idx has shape {tuple(idx.shape)}; it must be (batch, seq)")
        x = self.emb_dropout(self.token_embedding(idx))
        options: dict[str, Any] = {"inplace": True} if inplace else {}
        if cu_seqlens is not None:
            options["cu_seqlens"] = cu_seqlens
        if padding is not None:
            options["padding"] = padding
        if not return_last_state:
            return self.lm_head(self.xlstm_block_stack(x, state, **options))
        x, after = self.xlstm_block_stack(x, state, return_last_state=True, **options)
        return self.lm_head(x), after

    def step(
        self, idx: Tensor, state: StackState | None = None, *, padding: Tensor | None = None
    ) -> tuple[Tensor, StackState]:
        """Reads one token of each row, idx (batch, 1). Returns logits and the state; see :meth:`xLSTMBlockStack.step`.

        Raises:
            ValueError: idx is not (batch, 1). The state is unchanged.
        """
        if idx.dim() != 2 or idx.shape[1] != 1:
            raise ValueError(
                f"idx has shape {tuple(idx.shape)}; a step takes one token of each row, (batch, 1); for several call "
                "forward with return_last_state=True"
            )
        options: dict[str, Any] = {"inplace": not torch.is_grad_enabled(), "padding": padding}
        return self(idx, state, return_last_state=True, **options)

    def reset_parameters(self) -> None:
        self.xlstm_block_stack.reset_parameters()
        small_init(self.token_embedding.weight, self.config.embedding_dim)
        if not self.config.tie_weights and isinstance(self.lm_head, nn.Linear):
            small_init(self.lm_head.weight, self.config.embedding_dim)

    def get_weight_decay_optim_groups(self) -> tuple[tuple[nn.Parameter, ...], tuple[nn.Parameter, ...]]:
        """The trainable parameters with weight decay, then those without it. Biases, norms, recurrent weights and skips
        have none, nor has the embedding unless `weight_decay_on_embedding`."""
        groups: dict[bool, list[nn.Parameter]] = {True: [], False: []}
        for name, parameter in self.named_parameters():
            if parameter.requires_grad:
                decays = "weight" in name and "norm" not in name
                if parameter is getattr(self.token_embedding, "weight", None):
                    decays = self.config.weight_decay_on_embedding
                groups[decays].append(parameter)
        return tuple(groups[True]), tuple(groups[False])

    def get_weight_decay_optim_group_param_names(self) -> tuple[list[str], list[str]]:
        """The names of the parameters in :meth:`get_weight_decay_optim_groups`."""
        names = {id(parameter): name for name, parameter in self.named_parameters()}
        decay, rest = ([names[id(p)] for p in group] for group in self.get_weight_decay_optim_groups())
        return decay, rest
