"""Linear layers exchanged for torchao's: which ones, what they compute, and what they work with."""

from __future__ import annotations

import copy
import sys
import types

import pytest
import torch
from torch import nn

from flash_xlstm import training

pytest.importorskip("transformers")
from flash_xlstm.models import xLSTMConfig, xLSTMForCausalLM

MODES = ("single", "fused")
RECIPES = ("tensorwise", "rowwise", "rowwise_with_gw_hp")
PER_BLOCK = {
    "single": {f"mlstm_layer.{x}" for x in ("q", "k", "v", "ogate_preact", "out_proj")}
    | {f"ffn.{x}" for x in ("proj_up_gate", "proj_up", "proj_down")},
    "fused": {"mlstm_layer.qkv_opreact", "mlstm_layer.out_proj", "ffn.proj_up_gate_z", "ffn.proj_down"},
}


@pytest.fixture
def torchao():
    return pytest.importorskip("torchao", reason="torchao is not installed")


def small(mode: str = "single", **options) -> xLSTMForCausalLM:
    torch.manual_seed(0)
    # 16 heads: the gates' layers are of a size that float8 products take, and stay nevertheless
    config = xLSTMConfig(256, 64, num_hidden_layers=2, num_heads=16, weight_mode=mode, **options)
    return xLSTMForCausalLM(config).train()


def tokens() -> torch.Tensor:
    return torch.randint(0, 256, (2, 32), generator=torch.Generator().manual_seed(1))


def loss_and_gradients(model: nn.Module, forward=None) -> tuple[float, dict[str, torch.Tensor]]:
    model.zero_grad()
    loss = (model if forward is None else forward)(input_ids=tokens(), labels=tokens()).loss
    loss.backward()
    return loss.item(), {name: p.grad.clone() for name, p in model.named_parameters()}


def distance(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
    """Of all gradients together, relative."""
    assert a.keys() == b.keys()
    return (sum((a[n] - b[n]).square().sum() for n in a) / sum(t.square().sum() for t in b.values())).sqrt().item()


@pytest.mark.parametrize("mode", MODES)
def test_large_layers_are_exchanged_and_nothing_else(torchao, mode):
    model = small(mode)
    parameters, before = dict(model.named_parameters()), copy.deepcopy(model.state_dict())
    names = training.convert_to_float8(model, emulate=True)
    assert set(names) == {f"backbone.blocks.{x}.{name}" for x in range(2) for name in PER_BLOCK[mode]}
    plain = {name.rpartition(".")[2] for name, layer in model.named_modules() if type(layer) is nn.Linear}
    assert plain == {"lm_head", *({"igate_preact", "fgate_preact"} if mode == "single" else {"ifgate_preact"})}
    assert all(parameters[name] is p for name, p in model.named_parameters())
    assert model.state_dict().keys() == before.keys()
    with pytest.raises(ValueError, match="no linear layer for float8"):  # there is none left
        training.convert_to_float8(model, emulate=True)


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("mode", MODES)
def test_gradients_are_those_of_the_plain_layers_but_for_rounding(torchao, mode, recipe):
    model = small(mode)
    loss, gradients = loss_and_gradients(model)
    training.convert_to_float8(model, recipe, emulate=True)
    rounded_loss, rounded = loss_and_gradients(model)
    assert rounded_loss == pytest.approx(loss, rel=2e-2)
    assert 1e-3 < distance(rounded, gradients) < 0.3  # rounded to three bits, in every layer


@pytest.mark.slow
@pytest.mark.parametrize("mode", MODES)
def test_checkpointing_and_compile_change_nothing(torchao, mode):
    model = small(mode)
    training.convert_to_float8(model, emulate=True)
    loss, gradients = loss_and_gradients(model)
    model.gradient_checkpointing_enable()
    again_loss, again = loss_and_gradients(model)
    assert again_loss == loss and distance(again, gradients) < 1e-6
    torch._dynamo.reset()
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(model, fullgraph=True, backend=backend)
    compiled_loss, compiled_gradients = loss_and_gradients(model, compiled)
    torch._dynamo.reset()
    assert len(graphs) == 1
    assert compiled_loss == pytest.approx(loss, rel=1e-4) and distance(compiled_gradients, gradients) < 1e-2


def test_steps_lower_the_loss_and_the_model_is_saved(torchao, tmp_path):
    model = small()
    training.convert_to_float8(model, emulate=True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(8):
        losses.append(loss_and_gradients(model)[0])
        optimizer.step()
    assert losses[-1] < losses[0] - 0.5
    model.save_pretrained(tmp_path)
    loaded = xLSTMForCausalLM.from_pretrained(tmp_path)
    assert type(loaded.backbone.blocks[0].ffn.proj_down) is nn.Linear
    assert all(torch.equal(p, loaded.get_parameter(name)) for name, p in model.named_parameters())


def test_sizes_that_float8_does_not_take_stay(torchao):
    model = nn.Sequential(nn.Linear(32, 48), nn.Linear(48, 40), nn.Linear(40, 16), nn.Linear(16, 16))
    assert training.convert_to_float8(model, emulate=True) == ["0", "3"]


def test_other_recipes_are_refused():
    with pytest.raises(ValueError, match="recipe is 'mxfp8'; it must be one of tensorwise, rowwise"):
        training.convert_to_float8(small(), "mxfp8")


def test_without_torchao_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchao.float8", None)
    model = small()
    with pytest.raises(ImportError, match=r"pip install \"flash-xlstm\[float8\]\""):
        training.convert_to_float8(model, emulate=True)
    assert type(model.backbone.blocks[0].ffn.proj_down) is nn.Linear


def test_a_gpu_without_float8_is_named(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "A100")
    model = nn.Sequential(nn.Linear(16, 16))
    model[0]._parameters["weight"] = types.SimpleNamespace(device=torch.device("cuda", 0))
    with pytest.raises(ValueError, match=r"A100 of compute capability 8.0; float8 products need 8.9 or more"):
        training.convert_to_float8(model)


def test_trainer_with_an_adapter(torchao, tmp_path):
    pytest.importorskip("accelerate")
    peft = pytest.importorskip("peft")
    from transformers import Trainer, TrainingArguments

    model = small()
    training.convert_to_float8(model, emulate=True)
    config = peft.LoraConfig(r=4, target_modules=["q", "k", "v", "proj_down"], task_type="CAUSAL_LM")
    model = peft.get_peft_model(model, config)
    adapted = model.base_model.model.backbone.blocks[0].ffn.proj_down
    assert type(adapted.base_layer).__name__ == "Float8Linear" and type(adapted.lora_A["default"]) is nn.Linear
    before = {name: p.clone() for name, p in model.named_parameters()}
    arguments = TrainingArguments(
        tmp_path, max_steps=3, per_device_train_batch_size=2, gradient_checkpointing=True, learning_rate=1e-2,
        use_cpu=True, report_to=[], save_strategy="no", logging_steps=1, disable_tqdm=True,
    )  # fmt: skip
    rows = [{"input_ids": row, "labels": row} for row in tokens().repeat(3, 1)]
    trainer = Trainer(model, arguments, train_dataset=rows)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(losses) == 3 and losses[-1] < losses[0]
    changed = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert changed and all("lora_" in name for name in changed)
