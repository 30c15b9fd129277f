from __future__ import annotations

import pytest
import torch

from flash_xlstm.nn import FeedForward, convert_weight_mode

GROUPS = {"ab": {"a": 2, "b": 3}}


def test_convert_there_and_back():
    single = {"x.a.weight": torch.randn(2, 4), "x.b.weight": torch.randn(3, 4), "other": torch.zeros(1)}
    state = dict(single)
    convert_weight_mode(state, "x.", GROUPS, "fused")
    assert set(state) == {"x.ab.weight", "other"}
    assert torch.equal(state["x.ab.weight"], torch.cat([single["x.a.weight"], single["x.b.weight"]]))
    convert_weight_mode(state, "x.", GROUPS, "fused")  # already there: nothing to do
    convert_weight_mode(state, "x.", GROUPS, "single")
    assert state.keys() == single.keys()
    assert all(torch.equal(state[name], single[name]) for name in single)
    storages = {state[name].untyped_storage().data_ptr() for name in ("x.a.weight", "x.b.weight")}
    assert len(storages) == 2


def test_incomplete_or_misshapen_groups_are_left_for_load_state_dict_to_report():
    state = {"a.weight": torch.zeros(2, 4)}
    convert_weight_mode(state, "", GROUPS, "fused")
    assert set(state) == {"a.weight"}
    state = {"ab.weight": torch.zeros(6, 4)}
    convert_weight_mode(state, "", GROUPS, "single")
    assert set(state) == {"ab.weight"}


def test_offloaded_weights_are_refused():
    with torch.device("meta"):
        layer = FeedForward(4, 8)
    with pytest.raises(ValueError, match="proj_up_gate, proj_up are offloaded"):
        layer.set_weight_mode("fused")
