from __future__ import annotations

import pytest
import torch
from safetensors.torch import save_file

from flash_xlstm.models import xLSTMCache, xLSTMConfig
from flash_xlstm.models.cache import one_cache


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


def _fixed(config):
    cache = _fill(xLSTMCache(config, 2))
    cache.set_seq_length(7)
    return cache


def _same(a, b):
    pairs = zip(a.rnn_state.values(), b.rnn_state.values(), strict=True)
    return all(torch.equal(x, y) and x.dtype == y.dtype for s, t in pairs for x, y in zip(s, t, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_save_and_load(config, tmp_path, dtype):
    cache = _fill(xLSTMCache(config, 3, dtype))
    cache.set_seq_length(11)
    cache.save(tmp_path / "prefix.safetensors")
    loaded = xLSTMCache.load(tmp_path / "prefix.safetensors", config)
    assert _same(cache, loaded) and loaded.get_seq_length() == 11 and loaded.dtype == dtype
    assert [path.name for path in tmp_path.iterdir()] == ["prefix.safetensors"]


def test_a_failed_save_leaves_what_was_there(config, tmp_path, monkeypatch):
    path = tmp_path / "prefix.safetensors"
    _fixed(config).save(path)
    before = path.read_bytes()
    monkeypatch.setattr("flash_xlstm.models.cache.os.replace", lambda *args: (_ for _ in ()).throw(OSError("full")))
    with pytest.raises(OSError, match="full"):
        xLSTMCache(config, 1).save(path)
    assert path.read_bytes() == before and len(list(tmp_path.iterdir())) == 1


def test_load_errors(config, tmp_path):
    path = tmp_path / "x.safetensors"
    with pytest.raises(OSError):
        xLSTMCache.load(path)
    path.write_bytes(b"no tensors")
    with pytest.raises(ValueError, match=r"x.safetensors holds no xLSTM cache"):
        xLSTMCache.load(path)
    save_file({"a": torch.zeros(1)}, path)
    with pytest.raises(ValueError, match="holds no xLSTM cache"):
        xLSTMCache.load(path)
    _fixed(config).save(path)
    other = xLSTMConfig(vocab_size=8, hidden_size=32, num_hidden_layers=2, num_heads=2)
    with pytest.raises(ValueError, match=r"holds the cache of another model.*2 layers of shape"):
        xLSTMCache.load(path, other)
    device = f"cuda:{torch.cuda.device_count()}"
    with pytest.raises(ValueError, match=f"device is '{device}', which torch cannot use"):
        xLSTMCache.load(path, config, device)


def test_expand_and_copy(config):
    cache = _fixed(config)
    wide = cache.expand(3)
    assert wide.batch_size == 6 and cache.batch_size == 2 and wide.get_seq_length() == 7
    assert wide.rnn_state[1][2][:, 0].tolist() == [10.0] * 3 + [11.0] * 3
    target = xLSTMCache(config, 2)
    addresses = [t.data_ptr() for state in target.rnn_state.values() for t in state]
    assert target.copy_(cache) is target and _same(target, cache) and target.get_seq_length() == 7
    assert addresses == [t.data_ptr() for state in target.rnn_state.values() for t in state]


@pytest.mark.parametrize(
    ("place", "change"),
    [(0, lambda t: t[:, :, :3]), (1, lambda t: t[:, :, :3]), (2, lambda t: t[:1]), (0, torch.Tensor.bfloat16)],
)
def test_check_looks_at_every_layer(config, place, change):
    cache = _fixed(config)
    cache.check(config, 2)
    state = list(cache.rnn_state[1])
    state[place] = change(state[place])
    cache.rnn_state[1] = tuple(state)
    with pytest.raises(ValueError, match=f"cache_params has {'cnm'[place]} of shape .* in layer 1"):
        cache.check(config, 2)


@pytest.mark.cuda
def test_moves_between_devices(config, tmp_path):
    cache = _fixed(config)
    there = cache.clone().to("cuda")
    assert there.rnn_state[1][0].is_cuda and _same(there.clone().to("cpu"), cache)
    there.save(tmp_path / "x")
    assert xLSTMCache.load(tmp_path / "x", config, "cuda").rnn_state[0][0].is_cuda
    assert _same(xLSTMCache.load(tmp_path / "x"), cache)


def test_describes_itself(config):
    assert "c=(1, 2, 4, 8)" in repr(xLSTMCache(config, 1))


def test_one_cache_of_many_names(config):
    cache = _fixed(config)
    assert one_cache(cache_params=None, cache=None) is None
    assert one_cache(cache_params=None, cache=cache, past_key_values=cache) is cache
    with pytest.raises(ValueError, match="cache and past_key_values are names of one argument"):
        one_cache(cache_params=None, cache=cache, past_key_values=cache.clone())


@pytest.mark.parametrize("name", ["cache_params", "cache", "past_key_values"])
def test_foreign_caches_are_refused(config, name):
    from transformers import DynamicCache
    from transformers.models.xlstm.modeling_xlstm import xLSTMCache as StockCache

    for foreign in (DynamicCache(), StockCache(config, 1), [(torch.zeros(1),) * 3], {0: None}):
        with pytest.raises(TypeError, match=rf"{name} is a .*; it must be a flash_xlstm.models.xLSTMCache or None"):
            one_cache(**{name: foreign})


@pytest.mark.parametrize("rows", [[2, 0], (0, 2), torch.tensor([0, 2]), torch.tensor([True, False, True])], ids=repr)
@pytest.mark.parametrize("grad", [False, True])
def test_reset_of_rows(config, rows, grad):
    cache = _fill(xLSTMCache(config, 3))
    cache.set_seq_length(7)
    cache.unread = torch.tensor([2, 1, 0])
    cache.rnn_state[1][0][0] = torch.nan
    before = {layer: tuple(t.clone() for t in state) for layer, state in cache.rnn_state.items()}
    addresses = [t.data_ptr() for state in cache.rnn_state.values() for t in state]
    with torch.set_grad_enabled(grad):
        cache.reset(rows)
    for layer, state in cache.rnn_state.items():
        for t, old in zip(state, before[layer], strict=True):
            assert torch.equal(t[1], old[1]) and not t[[0, 2]].any()
    assert cache.get_seq_length() == 7 and cache.unread.tolist() == [0, 1, 0]
    assert (addresses == [t.data_ptr() for state in cache.rnn_state.values() for t in state]) == (not grad)


@pytest.mark.parametrize(
    ("rows", "error", "message"),
    [
        ([3], ValueError, "rows holds 3; they must be from 0 to 2"),
        ([-1, 0], ValueError, "rows holds -1; they must be from 0 to 2"),
        ([True, False], ValueError, r"rows has shape \(2,\); it must be 1-D, and \(3,\) if it is bool"),
        (torch.zeros(1, 1, dtype=torch.long), ValueError, r"rows has shape \(1, 1\)"),
        ([0.0], TypeError, "rows has dtype float32; it must be numbers of rows, or bool"),
        (1, TypeError, "rows is 1; it must be a sequence of numbers of rows"),
        ({1}, TypeError, r"rows is \{1\}; it must be a sequence"),
    ],
)
def test_wrong_rows_are_refused(config, rows, error, message):
    cache = _fixed(config)
    cache.batch_select_indices(torch.tensor([0, 1, 1]))
    before = cache.clone()
    for grad in (False, True):
        with torch.set_grad_enabled(grad), pytest.raises(error, match=message):
            cache.reset(rows)
    cache.reset([])
    assert _same(cache, before)


def test_rows_are_selected_by_any_sequence(config):
    for rows in ([2, 0], torch.tensor([2, 0]), torch.tensor([2, 0], dtype=torch.int32)):
        cache = _fill(xLSTMCache(config, 3))
        cache.batch_select_indices(rows)
        assert cache.rnn_state[1][2][:, 0].tolist() == [12.0, 10.0]
    cache = _fill(xLSTMCache(config, 3))
    cache.batch_select_indices([True, False, True])
    assert cache.rnn_state[1][2][:, 0].tolist() == [10.0, 12.0]
    compiled = torch.compile(cache.reorder_cache, backend="aot_eager", fullgraph=True)
    compiled(torch.tensor([1, 0]))
    assert cache.rnn_state[1][2][:, 0].tolist() == [12.0, 10.0]
    torch._dynamo.reset()


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda c: c.expand(0), ValueError, "copies is 0; it must be at least 1"),
        (lambda c: c.expand(-1), ValueError, "copies is -1; it must be at least 1"),
        (lambda c: c.expand(1.5), TypeError, "copies is 1.5; it must be a whole number"),
        (lambda c: c.expand(None), TypeError, "copies is None; it must be a whole number"),
        (lambda c: c.batch_repeat_interleave(0), ValueError, "repeats is 0; it must be at least 1"),
        (lambda c: c.batch_select_indices([0, 2]), ValueError, "indices holds 2; they must be from 0 to 1"),
        (
            lambda c: c.batch_select_indices(torch.tensor([-1])),
            ValueError,
            "indices holds -1; they must be from 0 to 1",
        ),
        (lambda c: c.batch_select_indices([0.5]), TypeError, "indices has dtype float32; it must be numbers of rows"),
        (lambda c: c.batch_select_indices(None), TypeError, "indices is None; it must be a sequence"),
        (lambda c: c.reorder_cache(torch.tensor([0, 5])), ValueError, "beam_idx holds 5; they must be from 0 to 1"),
    ],
)
def test_wrong_arguments_are_refused(config, call, error, message):
    cache = _fixed(config)
    before = cache.clone()
    with pytest.raises(error, match=message):
        call(cache)
    assert _same(cache, before)


def test_a_cache_needs_a_configuration_and_a_size(config):
    for size, error in ((-1, ValueError), (1.5, TypeError), (None, TypeError), (True, TypeError)):
        with pytest.raises(error, match=f"max_batch_size is {size}; it must be "):
            xLSTMCache(config, size)
    with pytest.raises(TypeError, match=r"config is a NoneType, without .*; it must be a model's xLSTMConfig"):
        xLSTMCache(None, 2)
    assert xLSTMCache(config, 0).batch_size == 0


def test_a_folder_is_no_cache(tmp_path):
    with pytest.raises(IsADirectoryError, match=r"path is .*, a folder; it must be a file"):
        xLSTMCache.load(tmp_path)


def test_detach(config):
    cache = _fixed(config)
    weight = torch.ones((), requires_grad=True)
    cache.update([tuple(weight * t for t in state) for state in cache.rnn_state.values()], 1)
    before = cache.clone()
    addresses = [t.data_ptr() for state in cache.rnn_state.values() for t in state]
    assert cache.detach() is cache and _same(cache, before) and cache.get_seq_length() == 8
    assert not any(t.requires_grad for state in cache.rnn_state.values() for t in state)
    assert addresses == [t.data_ptr() for state in cache.rnn_state.values() for t in state]
