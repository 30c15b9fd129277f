from __future__ import annotations

import math

import pytest
import torch
from torch.nn import functional as F

from flash_xlstm.models import xLSTMConfig, xLSTMForCausalLM
from flash_xlstm.training.data import Corpus
from flash_xlstm.training.metrics import cross_entropy, held_out_bits_per_byte


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("training", [True, False])
def test_the_loss_is_that_of_the_logits_without_them(monkeypatch, reduction, training):
    torch.manual_seed(0)
    config = xLSTMConfig(vocab_size=300, hidden_size=64, num_hidden_layers=1, num_heads=1)
    model = xLSTMForCausalLM(config).train(training)
    sequences = torch.randint(300, (3, 20))
    logits = model(sequences[:, :-1], use_cache=False).logits
    expected = F.cross_entropy(logits.flatten(0, 1), sequences[:, 1:].flatten(), reduction=reduction)
    wanted = torch.autograd.grad(expected, model.parameters())
    monkeypatch.setattr(xLSTMForCausalLM, "_logits", lambda *args: pytest.fail("logits were made"))
    loss = cross_entropy(model, sequences, reduction)
    torch.testing.assert_close(loss, expected)
    for found, gradient in zip(torch.autograd.grad(loss, model.parameters()), wanted, strict=True):
        assert (found - gradient).norm() <= 1e-5 * gradient.norm() + 1e-7


@pytest.mark.parametrize("length", [2, 32, 33, 34, 65, 100])
def test_every_token_counts_once(length):
    """Compares with the log-probabilities of single sequences."""
    config = xLSTMConfig(vocab_size=256, hidden_size=64, num_hidden_layers=1, num_heads=1)
    torch.manual_seed(0)
    model = xLSTMForCausalLM(config).train()
    tokens = torch.randint(0, 256, (length,), dtype=torch.uint8)
    corpus = Corpus(tokens, tokens, bytes(2 * length), 1.0, "")
    bits = math.log2(256)
    with torch.no_grad():
        for start in range(0, length - 1, 32):
            piece = tokens[start : start + 33].long()
            log_p = model(piece[None, :-1], use_cache=False).logits[0].log_softmax(-1)
            bits -= float(log_p.gather(1, piece[1:, None]).sum()) / math.log(2)
    actual = held_out_bits_per_byte(model, corpus, 32, 2, torch.float32)
    assert actual == pytest.approx(bits / (2 * length), rel=1e-5)
    assert model.training
