"""Greedy output of vLLM's engine, request by request, beside our own model's `generate`."""

from __future__ import annotations

import weakref

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

pytest.importorskip("vllm", reason="vLLM has an environment of its own: make test-vllm")

MIXED = [1, 1, 2, 3, 15, 16, 17, 63, 64, 65, 100, 129, 300, 511, 2500, *range(20, 190, 10)]


@pytest.fixture(scope="module")
def engine(served):
    with served.engine_of(served.folder) as engine:
        yield engine


def test_32_requests_at_once(served, engine):
    asked = served.prompts(*MIXED)
    assert len(asked) == 32
    free = engine.free_blocks
    assert engine.tokens(asked, 24) == served.continuations(asked)
    assert engine.free_blocks == free


def test_old_states_are_not_read(served, engine):
    asked = served.prompts(1, 1, 2, 40)
    engine.spoil()
    assert engine.tokens(asked, 24) == served.continuations(asked)
    for layer in engine.layers:  # the null block is nobody's state
        assert all(pool[0].isnan().all() for pool in layer.kv_cache)


def test_aborted_requests_give_their_blocks_back(served, engine):
    from vllm import SamplingParams

    free, core = engine.free_blocks, engine.llm.llm_engine
    for number, ids in enumerate(served.prompts(5, 50, 500)):
        core.add_request(str(number), {"prompt_token_ids": ids}, SamplingParams(max_tokens=1000, detokenize=False))
    for _ in range(5):
        core.step()
    assert engine.free_blocks == free - 3
    core.abort_request(["0", "1", "2"])
    while core.has_unfinished_requests():
        core.step()
    core.step()
    assert engine.free_blocks == free
    asked = served.prompts(7, 8, 9)
    assert engine.tokens(asked, 24) == served.continuations(asked)


def test_lengths_without_a_flag(engine):
    assert engine.config.model_config.max_model_len == 131_072
    assert engine.config.cache_config.mamba_block_size == 131_072


def test_steps_do_not_wait_for_the_device(served, engine, monkeypatch):
    """No operator of a layer or of the plugin's metadata reads a value back to the host."""
    from flash_xlstm.integrations.vllm import backend, layer

    def is_mask(t):
        return isinstance(t, torch.Tensor) and t.dtype == torch.bool

    class NoReading(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            name, operands = function._schema.name, [args, *args]  # with masks, indices are read back
            masks = [t for part in operands if isinstance(part, (list, tuple)) for t in part if is_mask(t)]
            assert name not in ("aten::_local_scalar_dense", "aten::nonzero", "aten::equal")
            assert not (masks and "index" in name)
            return function(*args, **(kwargs or {}))

    def strictly(function, seen):
        def strict(*args, **kwargs):
            seen.append(1)
            with NoReading():
                return function(*args, **kwargs)

        return strict

    run, slots = [], []
    monkeypatch.setattr(layer.xLSTMLayer, "run", strictly(layer.xLSTMLayer.run, run))
    monkeypatch.setattr(backend, "_slots", strictly(backend._slots, slots))
    asked = served.prompts(1, 20, 33)
    assert engine.tokens(asked, 8) == served.continuations(asked, 8)
    assert run and slots


def test_prompts_read_in_small_chunks(served):
    with served.engine_of(served.folder, max_num_batched_tokens=16, max_num_seqs=8) as engine:
        engine.spoil()
        asked = served.prompts(1, 2, 15, 16, 17, 31, 32, 33, 49, 100, 257)
        assert engine.tokens(asked, 24) == served.continuations(asked)
        alone = served.prompts(17, seed=2)  # a chunk, then one token with a state
        assert engine.tokens(alone, 24) == served.continuations(alone)


@pytest.fixture(scope="module")
def caching(served):
    with served.engine_of(
        served.folder, enable_prefix_caching=True, block_size=32, num_gpu_blocks_override=24, max_num_seqs=8
    ) as engine:
        yield engine


def test_prefix_caching(served, caching):
    prefix, one, other = served.prompts(100, 30, 45)
    assert caching.generate([prefix], 24)[0].num_cached_tokens == 0
    asked = [prefix, prefix + one, prefix + other, prefix[:99], prefix[:64] + one]
    outputs = caching.generate(asked, 24)
    # vLLM keeps a request's last whole block, of a hundred tokens the third of 32.
    assert [output.num_cached_tokens for output in outputs] == [96, 96, 96, 96, 0]
    assert [list(output.outputs[0].token_ids) for output in outputs] == served.continuations(asked)


def test_prefixes_are_evicted(served, caching):
    asked = served.prompts(150, seed=3)
    want = served.continuations(asked)
    assert caching.tokens(asked, 24) == want
    others = served.prompts(*[100] * 16, seed=4)
    assert caching.tokens(others, 24) == served.continuations(others)
    again = caching.generate(asked, 24)[0]
    assert again.num_cached_tokens == 0
    assert list(again.outputs[0].token_ids) == want[0]


def test_preemption(served, monkeypatch):
    """Where prefixes are cached a request takes a block for each 32 tokens, and a small pool runs out."""
    options = {"enable_prefix_caching": True, "block_size": 32, "num_gpu_blocks_override": 9, "max_num_seqs": 8}
    with served.engine_of(served.folder, **options) as engine:
        preempted, scheduler = [], engine.scheduler
        own = scheduler._preempt_request
        monkeypatch.setattr(scheduler, "_preempt_request", lambda *a, **k: (preempted.append(a[0]), own(*a, **k))[1])
        free = engine.free_blocks
        asked = served.prompts(30, 31, 32, 33, 60, 1)
        assert engine.tokens(asked, 100) == served.continuations(asked, 100)
        assert preempted
        assert engine.free_blocks == free


def test_c_in_bfloat16(served, tmp_path):
    model = served.make_checkpoint(tmp_path)
    model.config.inference_state_dtype = "bfloat16"
    asked = served.prompts(1, 10, 100)
    with served.engine_of(tmp_path, mamba_ssm_cache_dtype="bfloat16") as engine:
        assert [pool.dtype for pool in engine.layers[0].kv_cache] == [torch.bfloat16, torch.float32, torch.float32]
        assert engine.tokens(asked, 24) == served.continuations_of(model, asked, 24)


def _fuse(model, folder):
    model.set_weight_mode("fused")
    torch.save(model.state_dict(), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


def _name_as_nx_ai(model, folder):
    from safetensors.torch import load_file, save_file

    weights = load_file(folder / "model.safetensors")
    weights["embedding.weight"] = weights.pop("backbone.embeddings.weight")
    save_file(weights, folder / "model.safetensors", {"format": "pt"})


@pytest.mark.parametrize(
    ("options", "change"),
    [
        pytest.param({}, _fuse, id="fused"),
        pytest.param({}, _name_as_nx_ai, id="nx-ai"),
        pytest.param({"use_bias": True}, None, id="biases"),
        pytest.param({"tie_word_embeddings": True}, None, id="tied"),
        pytest.param({"num_heads": 1, "qk_dim_factor": 7 / 64, "v_dim_factor": 5 / 64}, None, id="one odd head"),
        pytest.param({"add_out_norm": False, "gate_soft_cap": None, "output_logit_soft_cap": None}, None, id="no caps"),
        pytest.param({"num_hidden_layers": 1, "vocab_size": 259}, None, id="one block"),
    ],
)
def test_checkpoints(served, tmp_path, options, change):
    model = served.make_checkpoint(tmp_path, **options)
    if change is not None:
        change(model, tmp_path)
    asked = served.prompts(1, 5, 40)
    with served.engine_of(tmp_path) as engine:
        assert engine.tokens(asked, 16) == served.continuations_of(model, asked, 16)
        for layer in engine.layers:
            assert all(slot.data_ptr() % 16 == 0 for slot in layer.state[0][:2])


def test_weights_are_read_one_by_one(served, monkeypatch):
    """Of the tensors of a checkpoint few are in memory at once."""
    from flash_xlstm.integrations.vllm.model import xLSTMForCausalLM

    alive, most, names = weakref.WeakSet(), [0], []
    own = xLSTMForCausalLM.load_weights

    def watched(weights):
        for name, tensor in weights:
            tensor = tensor.clone()
            alive.add(tensor)
            most.append(len(alive))
            names.append(name)
            yield name, tensor

    monkeypatch.setattr(xLSTMForCausalLM, "load_weights", lambda self, weights: own(self, watched(weights)))
    with served.engine_of(served.folder):
        assert len(names) == len(served.model.state_dict())
        assert max(most) <= 3
