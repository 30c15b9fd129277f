"""Models with weights that accelerate keeps on another device between uses, and models on the meta device."""

from __future__ import annotations

import pytest
import torch

from flash_xlstm.models import xLSTMCache, xLSTMForCausalLM

accelerate = pytest.importorskip("accelerate")

GREEDY = {"do_sample": False, "eos_token_id": None, "pad_token_id": 1, "max_new_tokens": 12}

PARTS = {"backbone.embeddings": "cpu", "backbone.blocks.0": "cpu", "backbone.blocks.1": "disk"}
PARTS |= {"backbone.out_norm": "disk", "lm_head": "cpu"}

OFFLOADS = {
    "cpu_offload": lambda model, folder: accelerate.cpu_offload(model, execution_device=torch.device("cpu")),
    "disk_offload": lambda model, folder: accelerate.disk_offload(model, folder, execution_device=torch.device("cpu")),
    "one device": lambda model, folder: accelerate.dispatch_model(model, {"": "cpu"}, force_hooks=True),
    "parts": lambda model, folder: accelerate.dispatch_model(model, PARTS, offload_dir=folder),
    "all": lambda model, folder: accelerate.dispatch_model(model, dict.fromkeys(PARTS, "disk"), offload_dir=folder),
}


@pytest.mark.parametrize("offload", OFFLOADS.values(), ids=OFFLOADS)
@pytest.mark.parametrize("weight_mode", ["single", "fused"])
def test_offloaded_models_do_as_others(make_ours, tokens, tmp_path, offload, weight_mode):
    plain, model, ids = make_ours(weight_mode=weight_mode), make_ours(weight_mode=weight_mode), tokens(2, 9)
    model = offload(model, str(tmp_path))
    expected = plain.generate(ids, **GREEDY)
    assert torch.equal(model.generate(ids, **GREEDY), expected)
    assert torch.equal(torch.stack(list(model.stream(ids, **GREEDY)), 1), expected[:, 9:])
    assert torch.equal(model.generate(ids, num_beams=2, **GREEDY), plain.generate(ids, num_beams=2, **GREEDY))

    caches = [xLSTMCache(plain.config, 2) for _ in range(2)]
    for part in (ids[:, :5], ids[:, 5:6], ids[:, 6:]):
        for gradients in (False, True):
            copies = [cache.clone() for cache in caches]
            with torch.set_grad_enabled(gradients):
                logits = [m(part, cache_params=c).logits for m, c in zip((plain, model), copies, strict=True)]
            torch.testing.assert_close(logits[1], logits[0])
            for state, other in zip(copies[1].rnn_state.values(), copies[0].rnn_state.values(), strict=True):
                torch.testing.assert_close(state, other)  # on the same device, too
        caches = copies
    ours = model.generate(ids, return_dict_in_generate=True, **GREEDY).past_key_values
    assert {t.device.type for state in ours.rnn_state.values() for t in state} == {"cpu"}


def test_dispatched_models_leave_each_state_where_its_block_runs(make_ours, tokens, tmp_path, monkeypatch):
    plain, ids = make_ours(), tokens(2, 9)
    plain.save_pretrained(tmp_path / "model")
    model = xLSTMForCausalLM.from_pretrained(tmp_path / "model", device_map=PARTS, offload_folder=tmp_path / "weights")
    monkeypatch.setattr(xLSTMCache, "to", lambda *args, **kwargs: pytest.fail("moved the whole cache"))
    options = {**GREEDY, "return_dict_in_generate": True}
    assert torch.equal(model.generate(ids, **options).sequences, plain.generate(ids, **options).sequences)


@torch.no_grad()
def test_update_takes_states_from_another_device(make_ours):
    config = make_ours().config
    cache = xLSTMCache(config, 1, device="meta")
    cache.update(xLSTMCache(config, 1).rnn_state.values(), 3)
    assert not any(t.is_meta for state in cache.rnn_state.values() for t in state)


@pytest.mark.parametrize("config", [{}, {"autocast_kernel_dtype": "float32"}, {"weight_mode": "fused"}], ids=str)
def test_shapes_on_the_meta_device(make_ours, tokens, config):
    configuration, ids = make_ours(**config).config, tokens(2, 7).to("meta")
    with torch.device("meta"):
        model = xLSTMForCausalLM(configuration)
    model.eval()
    out = model(ids, labels=ids, use_cache=True)
    assert out.logits.shape == (2, 7, 61) and out.loss.shape == () and out.logits.is_meta
    out.loss.backward()
    with torch.no_grad():
        cache = model(ids).cache_params
        assert model(ids[:, :1], cache_params=cache).logits.shape == (2, 1, 61)
    assert cache.get_seq_length() == 8 and cache.rnn_state[1][0].is_meta


@pytest.mark.cuda
def test_cuda_offload(make_ours, tokens, tmp_path):
    plain, ids = make_ours().cuda(), tokens(2, 9).cuda()
    expected = plain.generate(ids, **GREEDY)
    for model in (
        accelerate.cpu_offload(make_ours(), execution_device=torch.device("cuda", 0)),
        accelerate.dispatch_model(make_ours(), {**PARTS, "backbone.blocks.0": 0}, offload_dir=str(tmp_path)),
    ):
        out = model.generate(ids, return_dict_in_generate=True, **GREEDY)
        assert torch.equal(out.sequences, expected)
        assert {t.device.type for state in out.past_key_values.rnn_state.values() for t in state} == {"cuda"}
        assert torch.equal(model.generate(ids.cpu(), **GREEDY), expected.cpu())
