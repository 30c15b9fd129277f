from __future__ import annotations

import json

import pytest
import torch
from safetensors import safe_open
from transformers.models.xlstm import modeling_xlstm as stock

from flash_xlstm.models import xLSTMConfig, xLSTMForCausalLM, xLSTMModel

SHARDED = {"max_shard_size": "300KB"}


@pytest.mark.parametrize("save", [{}, SHARDED], ids=["one-file", "sharded"])
@pytest.mark.parametrize("mode", ["single", "fused"])
def test_ours_loads_in_transformers(make_ours, tokens, rel, tmp_path, mode, save):
    ours = make_ours(weight_mode=mode, use_bias=True)
    ours.save_pretrained(tmp_path, **save)
    assert (tmp_path / "model.safetensors.index.json").exists() == bool(save)
    theirs, report = stock.xLSTMForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    ids = tokens(2, 9)
    with torch.no_grad():
        assert rel(theirs(ids, use_cache=False).logits, ours(ids).logits) < 1e-5

    again, report = xLSTMForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert again.config.weight_mode == mode
    assert again.state_dict().keys() == ours.state_dict().keys()
    for name, value in ours.state_dict().items():
        assert torch.equal(again.state_dict()[name], value), name


@pytest.mark.parametrize("save", [{}, SHARDED], ids=["one-file", "sharded"])
@pytest.mark.parametrize("mode", ["single", "fused"])
def test_transformers_loads_in_ours(make_ours, make_stock, tokens, rel, tmp_path, mode, save):
    theirs = make_stock(make_ours(use_bias=True))
    theirs.save_pretrained(tmp_path, **save)
    ours, report = xLSTMForCausalLM.from_pretrained(tmp_path, weight_mode=mode, output_loading_info=True)
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert ours.config.weight_mode == mode
    assert hasattr(ours.backbone.blocks[0].mlstm_layer, "q") == (mode == "single")
    ids = tokens(2, 9)
    with torch.no_grad():
        assert rel(ours(ids).logits, theirs(ids, use_cache=False).logits) < 1e-5


def test_transformers_fused_checkpoint_loads(make_ours, make_stock, tokens, rel, tmp_path):
    ours = make_ours(weight_mode="fused", use_bias=True)
    make_stock(ours).save_pretrained(tmp_path)
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        assert any("qkv_opreact" in name for name in file.keys())
    ids = tokens(2, 9)
    for mode in ("single", "fused"):
        loaded = xLSTMForCausalLM.from_pretrained(tmp_path, weight_mode=mode)
        assert rel(loaded(ids).logits, ours(ids).logits) < 1e-5
        assert all(p.requires_grad for p in loaded.parameters()) and not loaded.training


@pytest.mark.parametrize("claimed", ["single", "fused"])
def test_a_config_that_names_the_other_mode(make_ours, make_stock, tokens, rel, tmp_path, claimed):
    ours = make_ours(weight_mode="single" if claimed == "fused" else "fused")
    make_stock(ours).save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "weight_mode": claimed}))
    loaded = xLSTMForCausalLM.from_pretrained(tmp_path)
    assert loaded.config.weight_mode == claimed
    assert rel(loaded(tokens(1, 5)).logits, ours(tokens(1, 5)).logits) < 1e-5


def test_given_config_decides_the_mode(make_ours, tokens, rel, tmp_path):
    ours = make_ours()
    ours.save_pretrained(tmp_path)
    config = xLSTMConfig.from_pretrained(tmp_path, weight_mode="fused", dtype=torch.bfloat16)
    loaded = xLSTMForCausalLM.from_pretrained(tmp_path, config=config, dtype=torch.float32)
    assert loaded.config.weight_mode == config.weight_mode == "fused"
    assert loaded.dtype == torch.float32
    assert rel(loaded(tokens(1, 5)).logits, ours(tokens(1, 5)).logits) < 1e-5


@pytest.mark.parametrize("use_bias", [False, True])
@pytest.mark.parametrize(("source", "target"), [("single", "fused"), ("fused", "single")])
def test_load_state_dict_converts(make_ours, tokens, rel, source, target, use_bias):
    a = make_ours(weight_mode=source, use_bias=use_bias)
    b = make_ours(seed=1, weight_mode=target, use_bias=use_bias)
    state = a.state_dict()
    names = list(state)
    b.load_state_dict(state)
    assert list(state) == names  # the caller's dict is left alone
    ids = tokens(2, 9)
    assert rel(b(ids).logits, a(ids).logits) < 1e-5
    del state["backbone.blocks.1.ffn.proj_down.weight"]
    with pytest.raises(RuntimeError, match="proj_down"):
        b.load_state_dict(state)


def test_set_weight_mode_there_and_back(make_ours, tokens, rel):
    model = make_ours(use_bias=True)
    model.backbone.blocks[0].requires_grad_(False)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    expected = model(tokens(2, 9)).logits
    model.set_weight_mode("fused")
    fused = model.backbone.blocks
    assert fused[0].mlstm_layer.qkv_opreact.weight.shape == (2 * 64 + 2 * 128, 128)
    assert fused[0].mlstm_layer.ifgate_preact.bias.shape == (4,)
    assert not fused[0].ffn.proj_up_gate_z.weight.requires_grad
    assert fused[1].ffn.proj_up_gate_z.weight.requires_grad
    assert rel(model(tokens(2, 9)).logits, expected) < 1e-5
    model.set_weight_mode("single")
    assert model.state_dict().keys() == before.keys()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    with pytest.raises(ValueError, match="mode is 'both'"):
        model.set_weight_mode("both")


def test_tied_model_loads_everywhere(make_ours, tokens, rel, tmp_path):
    ours = make_ours(tie_word_embeddings=True)
    ours.save_pretrained(tmp_path)
    ids = tokens(2, 9)
    theirs = stock.xLSTMForCausalLM.from_pretrained(tmp_path)
    assert rel(theirs(ids, use_cache=False).logits, ours(ids).logits) < 1e-5
    again = xLSTMForCausalLM.from_pretrained(tmp_path)
    assert again.lm_head.weight is again.get_input_embeddings().weight
    assert rel(again(ids).logits, ours(ids).logits) < 1e-6


def test_base_model_loads_from_a_causal_lm_and_back(make_ours, tokens, rel, tmp_path):
    ours = make_ours(weight_mode="fused")
    ours.save_pretrained(tmp_path / "lm")
    base = xLSTMModel.from_pretrained(tmp_path / "lm")
    ids = tokens(1, 5)
    expected = ours.backbone(ids).last_hidden_state
    assert rel(base(ids).last_hidden_state, expected) < 1e-6
    base.save_pretrained(tmp_path / "base")
    again = xLSTMForCausalLM.from_pretrained(tmp_path / "base")
    assert rel(again.backbone(ids).last_hidden_state, expected) < 1e-6


def test_dtype_argument(make_ours, tmp_path):
    make_ours().save_pretrained(tmp_path)
    for mode in ("single", "fused"):
        model = xLSTMForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16, weight_mode=mode)
        assert {p.dtype for p in model.parameters()} == {torch.bfloat16}


def test_missing_checkpoint_names_the_path(tmp_path):
    with pytest.raises(OSError, match="nothing_here"):
        xLSTMForCausalLM.from_pretrained(tmp_path / "nothing_here")
