"""Models and caches in torch.export."""

from __future__ import annotations

import io

import pytest
import torch
from torch.utils import _pytree as pytree

from flash_xlstm.models import xLSTMCache


def _saved_and_loaded(program):
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    return torch.export.load(file)


def _same(actual, expected):
    torch.testing.assert_close(actual.logits, expected.logits)
    ours, theirs = actual.cache_params, expected.cache_params
    assert type(ours) is xLSTMCache and ours.dtype == theirs.dtype
    assert ours.get_seq_length() == theirs.get_seq_length()
    torch.testing.assert_close(ours.rnn_state, theirs.rnn_state)


@torch.no_grad()
def test_export_with_default_arguments(make_ours, tokens):
    model, ids = make_ours(), tokens(2, 7)
    program = _saved_and_loaded(torch.export.export(model, (ids,)))
    other = tokens(2, 7, seed=1)
    _same(program.module()(other), model(other))

    auto = torch.export.Dim.AUTO
    program = torch.export.export(model, (ids,), dynamic_shapes={"input_ids": {0: auto, 1: auto}})
    other = tokens(3, 20, seed=1)
    _same(program.module()(other), model(other))


@torch.no_grad()
def test_an_exported_step_goes_on_from_its_own_cache(make_ours, tokens):
    model, ids = make_ours(), tokens(2, 9)
    cache = model(ids[:, :6]).cache_params
    shapes = {"input_ids": None, "cache_params": [*[None] * 6, torch.export.Dim.DYNAMIC]}
    program = torch.export.export(model, (ids[:, :1],), {"cache_params": cache.clone()}, dynamic_shapes=shapes)
    step, exported = _saved_and_loaded(program).module(), cache.clone()
    for t in (6, 7, 8):
        out = step(ids[:, t : t + 1], cache_params=exported)
        _same(out, model(ids[:, t : t + 1], cache_params=cache))
        exported = out.cache_params


@torch.no_grad()
def test_transformers_exporter(make_ours, tokens):
    exporters = pytest.importorskip("transformers.exporters")
    model, ids = make_ours(), tokens(2, 7)
    program = exporters.DynamoExporter().export(model, {"input_ids": ids}, exporters.DynamoConfig())
    if isinstance(program, torch.export.ExportedProgram):  # transformers 5.17's
        program = program.module()
    out = program(input_ids=ids)
    torch.testing.assert_close(out.logits, model(ids).logits)


def test_a_cache_is_a_tree(make_ours):
    cache = xLSTMCache(make_ours().config, 2, torch.bfloat16)
    cache.set_seq_length(5)
    leaves, spec = pytree.tree_flatten(cache)
    assert len(leaves) == 7 and leaves[-1] == 5
    cache.slots = torch.tensor([1, -1], dtype=torch.int32)
    cache.unread = torch.tensor([0, 3])
    keyed, spec = pytree.tree_flatten_with_path(cache)
    assert [str(path[0]) for path, _ in keyed] == [
        "['0.c']", "['0.n']", "['0.m']", "['1.c']", "['1.n']", "['1.m']", "['seq_length']", "['slots']", "['unread']"
    ]  # fmt: skip
    copy = pytree.tree_unflatten([leaf for _, leaf in keyed], pytree.treespec_loads(pytree.treespec_dumps(spec)))
    assert copy.slots is cache.slots and copy.unread is cache.unread and copy.get_seq_length() == 5
    assert copy.dtype == torch.bfloat16 and copy.rnn_state[1][0] is cache.rnn_state[1][0]
    assert "seq_length=None" in repr(
        pytree.tree_map(lambda leaf: leaf if isinstance(leaf, torch.Tensor) else None, cache)
    )
