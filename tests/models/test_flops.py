"""torch's counter of operations over models, beside products counted by hand."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from flash_xlstm.nn import block_stack
from flash_xlstm.ops.flops import mlstm_flops

BATCH, SEQ = 2, 24


@pytest.mark.parametrize("weight_mode", ["single", "fused"])
def test_the_7b(make_ours, tokens, weight_mode):
    model, ids = make_ours(weight_mode=weight_mode).train(), tokens(BATCH, SEQ)
    products = 2 * BATCH * SEQ * sum(m.weight.numel() for m in model.modules() if isinstance(m, nn.Linear))
    sizes = BATCH, SEQ, 2, model.config.qk_head_dim, model.config.v_head_dim
    cells = [2 * mlstm_flops(*sizes, backward=backward) for backward in (False, True)]
    with FlopCounterMode(display=False) as counter:
        model(ids, labels=ids).loss.backward()
    assert counter.get_total_flops() == 3 * products + sum(cells)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        cache = model.eval()(ids, use_cache=True).cache_params
    assert counter.get_total_flops() == products + cells[0]
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(ids[:, :1], cache_params=cache)
    assert counter.get_total_flops() == products // SEQ + 2 * 4 * cache.rnn_state[0][0].numel()


def test_the_block_stack():
    sizes = {"num_heads": 2, "conv1d_kernel_size": 0}  # torch counts depthwise convolutions as if they were whole
    config = block_stack.xLSTMBlockStackConfig(
        mlstm_block=block_stack.mLSTMBlockConfig(mlstm=block_stack.mLSTMLayerConfig(**sizes)),
        slstm_block=block_stack.sLSTMBlockConfig(slstm=block_stack.sLSTMLayerConfig(**sizes)),
        num_blocks=2, embedding_dim=16, slstm_at=[1], context_length=SEQ,
    )  # fmt: skip
    stack = block_stack.xLSTMBlockStack(config)
    inner = stack.blocks[0].xlstm.config._inner_embedding_dim
    # Every matrix, the recurrent ones too, multiplies each token once.
    matrices = sum(p.numel() for p in stack.parameters() if p.dim() > 1)
    cells = [mlstm_flops(BATCH, SEQ, 2, inner // 2, inner // 2, backward=backward) for backward in (False, True)]
    x = torch.randn(BATCH, SEQ, 16, requires_grad=True)
    with FlopCounterMode(display=False) as counter:
        stack(x).sum().backward()
    assert counter.get_total_flops() == 6 * BATCH * SEQ * matrices + sum(cells)
