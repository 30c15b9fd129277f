"""Bidirectional layers beside the same by hand, row by row."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F

from flash_xlstm.nn import BiMLSTM, BiSLSTM
from flash_xlstm.nn.block_stack import mLSTMLayerConfig, sLSTMLayerConfig, xLSTMBlock

WIDTH = 16
LENGTHS = (9, 1, 4, 6)


def make(kind, randomize, **options):
    config = mLSTMLayerConfig if kind is BiMLSTM else sLSTMLayerConfig
    sizes = {"round_proj_up_to_multiple_of": 8} if kind is BiMLSTM else {}
    return randomize(kind(config(embedding_dim=WIDTH, num_heads=2, **sizes), **options))


def by_hand(layer, rows):
    """The output at every token, one row after the other."""
    back_layer = layer.forward_layer if layer.backward_layer is None else layer.backward_layer
    outputs = []
    for row in rows:
        forth, back = layer.forward_layer(row[None])[0], back_layer(row.flip(0)[None])[0].flip(0)
        outputs.append(forth + back if layer.merge == "sum" else torch.cat([forth, back], -1))
    return torch.cat(outputs)


def gradients(layer, outputs, rows):
    weights = torch.randn(outputs.shape, generator=torch.Generator().manual_seed(5)).to(outputs)
    return [outputs, *torch.autograd.grad((outputs * weights).sum(), [*rows, *layer.parameters()])]


def laid_out(rows, way):
    """The rows in one tensor, what tells of them, and where the tokens are in it."""
    if way == "packed":
        offsets = F.pad(torch.tensor(LENGTHS).cumsum(0), (1, 0)).int().to(rows[0].device)
        return torch.cat(rows)[None], {"cu_seqlens": offsets}, torch.ones(1, sum(LENGTHS)).bool()
    if way == "whole":
        return torch.stack(rows), {}, torch.ones(len(rows), len(rows[0])).bool()
    seq, starts = 11, {"left": [2, 10, 7, 5], "right": [0, 0, 0, 0], "both": [1, 4, 0, 5]}[way]
    x = torch.stack([
        F.pad(row, (0, 0, start, seq - start - len(row)), value=7.0) for row, start in zip(rows, starts, strict=True)
    ])  # fmt: skip
    places, first = torch.arange(seq), torch.tensor(starts)[:, None]
    tokens = (places >= first) & (places < first + torch.tensor(LENGTHS)[:, None])
    return x, {"padding": ~tokens.to(x.device)}, tokens


@pytest.mark.parametrize("way", ["whole", "left", "right", "both", "packed"])
@pytest.mark.parametrize("merge", ["sum", "concat"])
@pytest.mark.parametrize("shared", [False, True], ids=["separate", "shared"])
@pytest.mark.parametrize("kind", [BiMLSTM, BiSLSTM])
def test_is_both_directions_of_every_row(kind, shared, merge, way, randomize, device):
    layer = make(kind, randomize, shared_weights=shared, merge=merge)
    assert (layer.backward_layer is None) == shared
    lengths = (6,) * 3 if way == "whole" else LENGTHS
    rows = [torch.randn(n, WIDTH, generator=torch.Generator().manual_seed(n + at)) for at, n in enumerate(lengths)]
    exact = copy.deepcopy(layer).double()
    wide = [row.double().requires_grad_() for row in rows]
    expected = gradients(exact, by_hand(exact, wide), wide)
    layer, rows = layer.to(device), [row.to(device).requires_grad_() for row in rows]
    for model, given, bound in ((exact, wide, 1e-12), (layer, rows, 2e-5)):
        x, options, tokens = laid_out(given, way)
        outputs = model(x, **options)
        assert outputs.isfinite().all() and outputs.shape[-1] == (WIDTH if merge == "sum" else 2 * WIDTH)
        for actual, want in zip(gradients(model, outputs[tokens], given), expected, strict=True):
            assert (actual.cpu().double() - want.cpu()).norm() <= bound * (want.norm() + 1e-3 * len(want))


@pytest.mark.parametrize("kind", [BiMLSTM, BiSLSTM])
def test_in_a_residual_block(kind, randomize):
    block = xLSTMBlock(make(kind, randomize))
    randomize(block)
    x, options, tokens = laid_out([torch.randn(n, WIDTH) for n in LENGTHS], "both")
    expected = x + block.xlstm(block.xlstm_norm(x), **options)
    assert torch.equal(block(x, **options)[tokens], expected[tokens])
    with pytest.raises(TypeError, match="return_last_state"):
        block(x, return_last_state=True)


def test_state_dicts(randomize):
    shared, separate = (make(BiSLSTM, randomize, shared_weights=s) for s in (True, False))
    assert {name.partition(".")[0] for name in shared.state_dict()} == {"forward_layer"}
    assert {name.partition(".")[0] for name in separate.state_dict()} == {"forward_layer", "backward_layer"}
    assert len(separate.state_dict()) == 2 * len(shared.state_dict())


def test_compiles_whole(randomize):
    layer = make(BiSLSTM, randomize, shared_weights=True)
    torch._dynamo.reset()
    compiled = torch.compile(layer, fullgraph=True, backend="eager")
    x, options, tokens = laid_out([torch.randn(n, WIDTH) for n in LENGTHS], "both")
    assert torch.allclose(compiled(x, **options)[tokens], layer(x, **options)[tokens], atol=1e-6)


def test_wrong_arguments_are_refused(randomize):
    with pytest.raises(TypeError, match="config is a sLSTMLayerConfig; it must be an mLSTMLayerConfig"):
        BiMLSTM(sLSTMLayerConfig(embedding_dim=8))
    with pytest.raises(ValueError, match="merge is 'mean'; it must be one of 'sum', 'concat'"):
        BiSLSTM(sLSTMLayerConfig(embedding_dim=8), merge="mean")
    for wrong in ("no", 1, None):
        with pytest.raises(TypeError, match=f"shared_weights is {wrong!r}; it must be True or False"):
            BiSLSTM(sLSTMLayerConfig(embedding_dim=8), shared_weights=wrong)
    layer, x = make(BiSLSTM, randomize), torch.zeros(2, 3, WIDTH)
    for options, message in (
        ({"padding": torch.zeros(2, 4).bool()}, r"padding has shape \(2, 4\)"),
        ({"padding": torch.tensor([[False, True, False]] * 2)}, "padding must be on the left and on the right"),
        ({"cu_seqlens": torch.tensor([0, 3])}, "x has batch 2; with cu_seqlens it must be 1"),
        ({"padding": torch.zeros(2, 3).bool(), "cu_seqlens": torch.tensor([0, 3])}, "padding is given beside cu_seq"),
    ):
        with pytest.raises(ValueError, match=message):
            layer(x, **options)
    with pytest.raises(ValueError, match="cu_seqlens must begin with 0"):
        layer(x[:1], cu_seqlens=torch.tensor([0, 2], dtype=torch.int32))
