from __future__ import annotations

import pytest
import torch

from flash_xlstm.models import xLSTMCache, xLSTMConfig


@pytest.fixture
def config():
    return xLSTMConfig(vocab_size=8, hidden_size=16, num_hidden_layers=2, num_heads=2)


def _fill(cache):
    for layer, state in cache.rnn_state.items():
        for t in state:
            t.copy_(torch.arange(t.shape[0]).view(-1, *[1] * (t.dim() - 1)) + 10 * layer)
    return cache


def test_shapes_and_dtypes(config):
    cache = xLSTMCache(config, 3)
    assert [tuple(t.shape) for t in cache.rnn_state[1]] == [(3, 2, 4, 8), (3, 2, 4), (3, 2)]
    assert {t.dtype for t in cache.rnn_state[0]} == {torch.float32}
    assert len(cache.rnn_state) == 2
    c, n, m = xLSTMCache(config, 3, dtype=torch.bfloat16, device="cpu").rnn_state[0]
    assert (c.dtype, n.dtype, m.dtype) == (torch.bfloat16, torch.float32, torch.float32)
    assert cache.get_seq_length() == cache.seqlen_offset == 0


def test_reorder_repeat_and_select(config):
    cache = _fill(xLSTMCache(config, 3))
    cache.reorder_cache(torch.tensor([2, 0, 0]))
    assert cache.rnn_state[1][2][:, 0].tolist() == [12.0, 10.0, 10.0]
    cache.batch_repeat_interleave(2)
    assert cache.rnn_state[0][1][:, 0, 0].tolist() == [2.0, 2.0, 0.0, 0.0, 0.0, 0.0]
    assert cache.batch_size == 6
    cache.batch_select_indices(torch.tensor([1, 2]))
    assert cache.rnn_state[0][0][:, 0, 0, 0].tolist() == [2.0, 0.0]


def test_clone_and_reset(config):
    cache = _fill(xLSTMCache(config, 2))
    cache.update(list(cache.rnn_state.values()), 5)
    copy = cache.clone()
    cache.reset()
    assert cache.get_seq_length() == 0 and not any(t.any() for t in cache.rnn_state[1])
    assert copy.get_seq_length() == 5 and copy.rnn_state[1][2][1, 0] == 11.0


def test_update_with_gradients_replaces_tensors(config):
    cache = xLSTMCache(config, 1)
    before = cache.rnn_state[0]
    cache.update([tuple(t + 1 for t in state) for state in cache.rnn_state.values()], 1)
    assert not any(t.any() for t in before)
    assert all((t == 1).all() for t in cache.rnn_state[0])
    with torch.no_grad():
        written = cache.rnn_state[0]
        cache.update([tuple(t + 1 for t in state) for state in cache.rnn_state.values()], 1)
    assert all((t == 2).all() for t in written)


def test_describes_itself(config):
    assert "c=(1, 2, 4, 8)" in repr(xLSTMCache(config, 1))
