"""The integration of torchtitan, by torchtitan's own train entry: ``make test-titan`` builds an environment for it."""

from __future__ import annotations

import importlib
import importlib.util
import json
import os
import random
import shutil
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch

from flash_xlstm.models import xLSTMConfig, xLSTMForCausalLM
from flash_xlstm.training import convert_to_float8

HERE = Path(__file__).parent
MODULE = "flash_xlstm.integrations.torchtitan"
STEPS, SEQ, ROWS = 4, 64, 2

titan = pytest.mark.skipif(
    importlib.util.find_spec("torchtitan") is None, reason="torchtitan is not installed; make test-titan runs this"
)


def integration(name="model"):
    return importlib.import_module(f"{MODULE}.{name}")


def test_not_installed(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchtitan", None)
    monkeypatch.delitem(sys.modules, MODULE, raising=False)
    with pytest.raises(ImportError, match=r'^torchtitan is not installed: pip install "flash-xlstm\[torchtitan\]"$'):
        importlib.import_module(MODULE)


@pytest.mark.parametrize(
    ("version", "torch_version", "message"),
    [
        ("0.2.2", "2.11.0", r"^torchtitan is 0.2.2; .* needs 0.3 .* and torch 2.13 or later$"),
        ("0.4.0", "2.13.0", r"^torchtitan is 0.4.0; .* needs 0.3 "),
        ("0.3.0", "2.11.0+cpu", r"^torch is 2.11.0\+cpu; torchtitan 0.3.0 needs 2.13 or later$"),
    ],
)
def test_other_versions(monkeypatch, version, torch_version, message):
    other = types.ModuleType("torchtitan")
    other.__version__ = version
    monkeypatch.setitem(sys.modules, "torchtitan", other)
    monkeypatch.delitem(sys.modules, MODULE, raising=False)
    monkeypatch.setattr(torch, "__version__", torch_version)
    with pytest.raises(RuntimeError, match=message):  # torchtitan hides an ImportError
        importlib.import_module(MODULE)


@pytest.fixture(scope="module")
def assets(tmp_path_factory):
    """A tokenizer, text, and a Hugging Face folder of a debug model."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    folder = tmp_path_factory.mktemp("assets")
    for name in ("tokenizer", "text"):
        (folder / name).mkdir()
    words, rng = ["state", "gate", "memory", "token", "head", "decay", "sum"], random.Random(0)
    texts = [" ".join(rng.choice(words) for _ in range(rng.randint(2, 15))) for _ in range(600)]
    (folder / "text" / "text.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in texts))
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel()
    special = ["<s>", "</s>"]
    tokenizer.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=300, special_tokens=special))
    tokenizer.save(str(folder / "tokenizer" / "tokenizer.json"))
    names = {"bos_token": special[0], "eos_token": special[1]}
    (folder / "tokenizer" / "tokenizer_config.json").write_text(json.dumps(names))
    torch.manual_seed(0)
    model = xLSTMForCausalLM(xLSTMConfig(**integration().FLAVORS["debugmodel"]))
    with torch.no_grad():  # gates that differ from token to token
        for name, p in model.named_parameters():
            if "gate_preact.weight" in name:
                p.normal_(0.0, 0.05)
    model.save_pretrained(folder / "hf")
    return folder


def train(assets, out, *options, config="xlstm_debugmodel", ranks=2):
    """Runs torchtitan under torchrun. Returns for each rank its steps, and the rest that it recorded."""
    record = out / "record"
    record.mkdir(parents=True, exist_ok=True)
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks),
        str(HERE / "titan_on_cpu.py"), "--module", MODULE, "--config", config,
        "--dump_folder", str(out), "--hf_assets_path", str(assets / "tokenizer"),
        "--dataloader.dataset_path", str(assets / "text"), "--training.seq_len", str(SEQ),
        "--training.local_batch_size", str(ROWS), "--training.steps", str(STEPS), "--debug.seed", "1",
        "--training.mixed_precision_param", "float32", "--checkpoint.enable", *options,
    ]  # fmt: skip
    own = {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "TITAN_RECORD": str(record)}
    environment = {**os.environ, **own, "HF_HOME": str(out / "cache")}
    ran = subprocess.run(command, capture_output=True, text=True, timeout=500, env=environment)
    assert ran.returncode == 0, ran.stderr[-20000:]
    return [
        (json.loads((record / f"steps-{rank}.json").read_text()), torch.load(record / f"first-{rank}.pt"))
        for rank in range(ranks)
    ]


def pretrained(assets):
    return "--checkpoint.initial_load_path", str(assets / "hf"), "--checkpoint.initial_load_in_hf"


@pytest.fixture(scope="module")
def trained(assets, tmp_path_factory):
    """A run on two ranks with their parts of the weights, from and to Hugging Face folders."""
    out = tmp_path_factory.mktemp("trained")
    to_hf = ("--checkpoint.last_save_model_only", "--checkpoint.last_save_in_hf")
    return out, train(assets, out, *pretrained(assets), *to_hf, "--checkpoint.interval", "2")


def check_first_step(assets, ranks, batches):
    """A recorded first step against our model in one process, with the same weights and batches."""
    model = xLSTMForCausalLM.from_pretrained(assets / "hf").train()
    joined = {name: torch.cat([batch[name] for batch in batches]) for name in batches[0]}
    documents = (joined["positions"] == 0).sum().item()
    assert documents >= 2 * len(joined["input"])  # rows hold several
    loss = model(joined["input"], shift_labels=joined["labels"], position_ids=joined["positions"]).loss
    loss.backward()
    gradients = [p.grad for p in model.parameters()]
    norm = torch.stack([g.norm() for g in gradients]).norm()
    for steps, first in ranks:
        assert abs(steps[0]["loss"] - loss.item()) < 1e-5 * loss.item()
        assert abs(steps[0]["norm"] - norm.item()) < 1e-5 * norm.item()
        assert len(first["gradients"]) == len(gradients)
        for (name, _), found, right in zip(model.named_parameters(), first["gradients"], gradients, strict=True):
            assert (found - right).norm() <= 5e-5 * right.norm() + 1e-9, name


@titan
@pytest.mark.slow
def test_first_step_is_our_models(assets, trained):
    _, ranks = trained
    check_first_step(assets, ranks, [first["batch"] for _, first in ranks])


@titan
@pytest.mark.slow
def test_loss_falls(trained):
    _, ranks = trained
    for steps, _ in ranks:
        assert [step["step"] for step in steps] == list(range(1, STEPS + 1))
        assert steps[-1]["loss"] < steps[0]["loss"] - 0.5


@titan
@pytest.mark.slow
def test_exported_folder(trained):
    out, ranks = trained
    folder = out / "checkpoint" / f"step-{STEPS}"
    assert {path.name for path in folder.iterdir()} == {
        "config.json", "generation_config.json", "model-00001-of-00001.safetensors", "model.safetensors.index.json",
        "tokenizer.json", "tokenizer_config.json",
    }  # fmt: skip
    model, info = xLSTMForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(info.values())
    assert model.dtype == torch.float32
    with torch.no_grad():
        logits = model.eval()(torch.arange(24).view(2, 12)).logits
    for _, first in ranks:
        assert torch.equal(first["logits"], logits)


@titan
@pytest.mark.slow
def test_resumes(assets, trained, tmp_path):
    """From a checkpoint of the run before, with validation beside it: the same losses."""
    out, ranks = trained
    shutil.copytree(out / "checkpoint" / "step-2", tmp_path / "checkpoint" / "step-2")
    text = ("--validator.dataloader.dataset", "c4_test", "--validator.dataloader.dataset_path", str(assets / "text"))
    resumed = train(assets, tmp_path, "--validator.enable", "--validator.freq", "4", "--validator.steps", "1", *text)
    for (steps, _), (whole, _) in zip(resumed, ranks, strict=True):
        assert steps[:-1] == whole[2:]
        assert set(steps[-1]) == {"step", "validation"} and steps[-1]["validation"] < whole[1]["loss"]


@titan
@pytest.mark.slow
@pytest.mark.parametrize("dimension", ["tensor", "context"])
def test_split_layers_and_sequences(assets, tmp_path, dimension):
    degree = (f"--parallelism.{dimension}_parallel_degree", "2")
    options = ("--training.steps", "1", "activation-checkpoint:full")
    ranks = train(assets, tmp_path, *pretrained(assets), *degree, *options)
    check_first_step(assets, ranks, [ranks[0][1]["batch"]])  # both ranks have it whole
    assert all(torch.equal(ranks[0][1]["batch"][name], t) for name, t in ranks[1][1]["batch"].items())


@titan
def test_float8_exchanges_what_ours_does():
    """At construction, and a step's loss and gradients in emulation."""
    model = integration("config_registry").xlstm_debugmodel_float8_emulate().model_spec.model.build()
    with torch.device("meta"):
        bare = integration("config_registry").xlstm_debugmodel().model_spec.model.build()
    torch.manual_seed(0)
    model.init_states()
    assert model.state_dict().keys() == bare.state_dict().keys()
    ours = xLSTMForCausalLM(model.config.xlstm())
    ours.load_state_dict(model.model.state_dict())
    names = convert_to_float8(ours, "tensorwise", emulate=True)
    assert [(name, type(m)) for name, m in model.model.named_modules() if "Float8" in type(m).__name__] == [
        (name, type(ours.get_submodule(name))) for name in names
    ]
    assert len(names) == 8 * 6  # not the head and the gates
    ids = torch.arange(64).view(2, 32)
    ours.train()(ids, shift_labels=ids, num_items_in_batch=1).loss.backward()
    model.train()(ids, labels=ids).backward()
    for (name, p), q in zip(ours.named_parameters(), model.parameters(), strict=True):
        assert torch.equal(p.grad, q.grad), name


@titan
@pytest.mark.parametrize("config", ["xlstm_debugmodel", "xlstm_debugmodel_float8_emulate"])
def test_all_weights_are_initialized_as_ours(config):
    model = getattr(integration("config_registry"), config)().model_spec.model.build()
    with torch.no_grad():
        for p in model.parameters():
            p.fill_(float("nan"))
    model.init_states()
    ours = xLSTMForCausalLM(model.config.xlstm())
    for (name, p), (_, q) in zip(model.model.named_parameters(), ours.named_parameters(), strict=True):
        assert torch.equal(p, q) if p.dim() == 1 else abs(p.std() - q.std()) <= 0.05 * q.std(), name


@titan
def test_sizes():
    registry = integration("config_registry")
    for name, parameters in {"xlstm_1_4b": 1.42e9, "xlstm_7b": 6.87e9}.items():
        model = getattr(registry, name)().model_spec.model
        with torch.device("meta"):
            count, flops = model.get_nparams_and_flops(model.build(), 8192)
        assert abs(count - parameters) < 0.01 * parameters
        assert flops == 6 * (count - model.xlstm().vocab_size * model.xlstm().hidden_size)


@titan
def test_folders_of_other_models_are_refused(assets, tmp_path):
    adapter = integration("state_dict_adapter").XLSTMStateDictAdapter
    right = integration().model_registry("debugmodel").model
    assert adapter(right, None).get_hf_storage_reader(str(assets / "hf"))
    other = integration().model_registry("debugmodel", output_logit_soft_cap=20.0).model
    with pytest.raises(ValueError, match=r"output_logit_soft_cap 30.0; it must be 20.0, as the configuration's"):
        adapter(other, None).get_hf_storage_reader(str(assets / "hf"))
    stacked = xLSTMForCausalLM.from_pretrained(assets / "hf", weight_mode="fused")
    from safetensors.torch import save_file

    save_file(stacked.state_dict(), tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"has no backbone.blocks.0.ffn.proj_up.weight; .* weight mode 'single'"):
        adapter(right, None).get_hf_storage_reader(str(tmp_path))
    with pytest.raises(ValueError, match="initial_load_in_hf_quantized is True"):
        adapter(right, None).get_hf_storage_reader(str(assets / "hf"), from_quantized=True)


@titan
@pytest.mark.parametrize(
    ("option", "message"),
    [
        (["--training.no_disable_cuda_graphs"], r"training.disable_cuda_graphs is False; it must be True"),
        (["--parallelism.spmd_backend", "full_dtensor"], r"spmd_backend is 'full_dtensor'; it must be 'spmd_types'"),
        (["--parallelism.expert_parallel_degree", "2"], r"expert_parallel_degree is 2; it must be 1"),
        (["--debug.spmd_typechecking"], r"spmd_typechecking is True; it must be False"),
        (
            ["--parallelism.context_parallel_degree", "2", "--parallelism.context_parallel_load_balancer", "headtail"],
            r"context_parallel_load_balancer is 'headtail'; it must be None",
        ),
        (["activation-checkpoint:selective"], r"activation_checkpoint is SelectiveAC.*; it must be 'full'"),
        (["activation-checkpoint:full", "--activation_checkpoint.debug"], r"FullAC.*debug=True.*must be 'full'"),
        (["--training.enable_cpu_offload"], r"enable_cpu_offload is True; it must be False"),
    ],
)  # fmt: skip
def test_settings_that_cannot_be_had(option, message):
    from torchtitan.config import ConfigManager

    config = ConfigManager().parse_args(["--module", MODULE, "--config", "xlstm_debugmodel", *option])
    with pytest.raises(ValueError, match=message):
        config.model_spec.model.update_from_config(config=config)
        config.model_spec.parallelize_fn(
            None, parallel_dims=None, training=config.training, parallelism=config.parallelism,
            compile_config=config.compile, ac_config=config.activation_checkpoint, dump_folder="",
        )  # fmt: skip


@titan
def test_arguments_in_error(monkeypatch):
    registry = integration().model_registry
    with pytest.raises(ValueError, match=r"flavor is '8B'; it must be one of debugmodel, 1.4B, 7B"):
        registry("8B")
    with pytest.raises(ValueError, match="num_heads"):
        registry("debugmodel", num_heads=3)
    from torchtitan.components.lora import LoRAConverter
    from torchtitan.components.loss import CrossEntropyLoss

    with pytest.raises(ValueError, match=r"made backbone.blocks.0.mlstm_layer.q a LoRALinear .* it must be"):
        registry("debugmodel", [LoRAConverter.Config(rank=4, alpha=8.0, target_modules=["q"])]).model.build()
    config = integration("config_registry").xlstm_debugmodel()
    config.loss = CrossEntropyLoss.Config()
    with pytest.raises(ValueError, match=r"it must be an XLSTMLoss.Config"):
        config.build()
    config, trainer = integration("config_registry").xlstm_debugmodel(), integration("trainer")
    large = types.SimpleNamespace(get_vocab_size=lambda: 2049)
    made = {"tokenizer": large, "model_config": config.model_spec.model}
    monkeypatch.setattr(trainer.Trainer, "__init__", lambda self, config: vars(self).update(made))
    with pytest.raises(ValueError, match="whose tokenizer has 2049 tokens; it must have at most 2048"):
        trainer.XLSTMTrainer(config)
    with pytest.raises(ValueError, match="not a loss; it must be given labels"):
        integration("trainer").XLSTMLoss.Config().build()(torch.ones(1, 2, 3), torch.ones(1, 2))


@titan
def test_forward_takes_positions_or_offsets():
    model = integration().model_registry("debugmodel").model.build()
    torch.manual_seed(0)
    model.init_states()
    ids, labels = torch.randint(2048, (2, 2, 16)).unbind()
    labels[0, 3] = -100
    positions = torch.tensor([[*range(16)], [*range(9), *range(7)]])
    cu_seqlens = torch.tensor([0, 16, 25, 32], dtype=torch.int32)
    logits = model(ids, positions)
    assert logits.shape == (2, 16, 2048)
    assert torch.equal(logits, model(ids, cu_seqlens=cu_seqlens))
    right = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum")
    torch.testing.assert_close(model(ids, labels=labels, cu_seqlens=cu_seqlens), right)
    torch.testing.assert_close(model.eval()(ids, labels=labels, cu_seqlens=cu_seqlens), right)
    batch = integration("trainer").with_labels({"input": ids, "positions": positions}, labels, None)
    assert batch.keys() == {"input", "labels", "cu_seqlens"} and torch.equal(batch["cu_seqlens"], cu_seqlens)
