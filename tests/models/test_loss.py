"""The model's loss without logits: the same as from them, and where it steps aside."""

from __future__ import annotations

import contextlib

import pytest
import torch
import transformers
from torch import nn

from flash_xlstm.models import modeling_xlstm as modeling


def run(model, *args, **kwargs):
    """The output and all gradients."""
    model.zero_grad()
    output = model(*args, **kwargs)
    output.loss.backward()
    return output, {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def joined(gradients):
    return torch.cat([gradients[name].flatten() for name in sorted(gradients)])


def shifted(ids):
    return nn.functional.pad(ids[:, 1:], (0, 1), value=-100)


ARGUMENTS = {
    "labels": lambda ids: {"labels": ids},
    "some labels": lambda ids: {"labels": ids.masked_fill(ids % 3 == 0, -100)},
    "int32": lambda ids: {"labels": ids, "shift_labels": shifted(ids).int()},
    "a mask": lambda ids: {"labels": ids, "attention_mask": (torch.arange(9) > 2).long().expand(2, 9)},
    "an ignored index": lambda ids: {"labels": ids, "ignore_index": int(ids[0, 1])},
    "items in the batch": lambda ids: {"labels": ids, "num_items_in_batch": torch.tensor(40)},
    "a number of items": lambda ids: {"labels": ids, "num_items_in_batch": 7},
    "shifted labels": lambda ids: {"shift_labels": shifted(ids).roll(1, 0)},
    "the last logits": lambda ids: {"labels": ids[:, -4:], "logits_to_keep": 4},
    "a cache": lambda ids: {"labels": ids, "use_cache": True, "output_hidden_states": True},
}
CONFIGS = {
    "default": {},
    "no cap": {"output_logit_soft_cap": None},
    "a low cap": {"output_logit_soft_cap": 1.0},
    "tied": {"tie_word_embeddings": True},
}


@pytest.mark.parametrize("arguments", ARGUMENTS)
@pytest.mark.parametrize("config", CONFIGS)
def test_as_from_the_logits(make_ours, tokens, rel, config, arguments):
    model, ids = make_ours(**CONFIGS[config]).train(), tokens(2, 9)
    given = ARGUMENTS[arguments](ids)
    expected, gradients = run(model, ids, **given, skip_logits=False)
    actual, mine = run(model, ids, **given)
    assert expected.logits is not None and actual.logits is None
    assert (actual.cache_params is None) == (expected.cache_params is None)
    assert actual.loss.dtype == torch.float32 and abs(actual.loss - expected.loss) <= 1e-6 * expected.loss
    assert mine.keys() == gradients.keys()
    for name, gradient in gradients.items():  # of gates' biases little but rounding is left
        assert rel(mine[name], gradient) < (1e-3 if "gate_preact.bias" in name else 1e-5), name


def test_when_there_are_logits(make_ours, tokens):
    model, ids = make_ours(), tokens(2, 9)
    for training in (False, True):
        model.train(training)
        assert model(ids).logits is not None
        assert (model(ids, labels=ids).logits is None) == training
        assert model(ids, labels=ids, skip_logits=False).logits is not None
        assert model(ids, labels=ids, skip_logits=True).logits is None
        assert model(ids, skip_logits=True).logits is not None
    loss, *rest = model(ids, labels=ids, return_dict=False)
    assert loss.shape == () and not rest


def _hooked(model):
    model.lm_head.register_forward_hook(lambda *a: None)


def _backward_hooked(model):
    model.lm_head.register_full_backward_hook(lambda *a: None)


def _biased(model):
    head = nn.Linear(128, 61)
    head.weight = model.lm_head.weight
    nn.init.zeros_(head.bias)
    model.lm_head = head


def _adapted(model):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(target_modules=["lm_head"], r=2)
    peft.inject_adapter_in_model(config, model)
    for p in model.parameters():
        p.requires_grad_()


def _parametrized(model):
    nn.utils.parametrizations.weight_norm(model.lm_head)


def _forwarded(model):
    forward = model.lm_head.forward
    model.lm_head.forward = lambda x: forward(x)


@pytest.mark.parametrize("change", [_hooked, _backward_hooked, _biased, _adapted, _parametrized, _forwarded])
@pytest.mark.filterwarnings("ignore")
def test_other_heads_make_logits(make_ours, tokens, monkeypatch, change):
    model, ids = make_ours().train(), tokens(2, 9)
    expected = model(ids, labels=ids).loss
    change(model)
    said = []
    monkeypatch.setattr(modeling._logger, "warning_once", said.append)
    output = model(ids, labels=ids)
    output.loss.backward()
    assert output.logits is not None and torch.allclose(output.loss, expected, rtol=1e-6)
    assert len(said) == 1 and said[0].startswith(f"lm_head is {type(model.lm_head).__name__}; it must be a plain")
    assert model(ids, labels=ids, skip_logits=True).logits is None


def test_the_warning_comes_once(make_ours, tokens, monkeypatch):
    model, ids = make_ours().train(), tokens(2, 9)
    _biased(model)
    said = []
    monkeypatch.setattr(modeling._logger, "warning", lambda *args, **kwargs: said.append(args[0]))
    type(modeling._logger).warning_once.cache_clear()
    for _ in range(3):
        model(ids, labels=ids)
    assert len(said) == 1 and "lm_head is Linear" in said[0]


@pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="torch has no gloo")
def test_sharded_weights(make_ours, tokens, monkeypatch, tmp_path):
    """With the head's weight whole within the model's forward, and with a head that gathers its own."""
    from torch.distributed.fsdp import fully_shard

    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    said = []
    monkeypatch.setattr(modeling._logger, "warning_once", said.append)
    try:
        model, ids = make_ours().train(), tokens(2, 9)
        expected, gradients = run(model, ids, labels=ids)
        for alone in (False, True):
            model = make_ours().train()
            for part in [*model.backbone.blocks, *[model.lm_head] * alone, model]:
                fully_shard(part)
            output = model(ids, labels=ids)
            output.loss.backward()
            assert (output.logits is not None) == alone and torch.allclose(output.loss, expected.loss, rtol=1e-6)
            for name, p in model.named_parameters():
                assert torch.allclose(p.grad.full_tensor(), gradients[name], rtol=1e-4, atol=1e-6), name
        assert len(said) == 1 and "lm_head is FSDPLinear" in said[0]
    finally:
        torch.distributed.destroy_process_group()


def test_a_loss_function_of_ones_own(make_ours, tokens):
    model, ids = make_ours().train(), tokens(2, 9)
    seen = []

    def loss_function(logits, labels, vocab_size, **kwargs):
        seen.append(logits.shape)
        return logits.square().mean()

    model.loss_function = loss_function
    output = model(ids, labels=ids)
    assert seen == [(2, 9, 61)] and output.logits is not None
    assert torch.equal(output.loss, output.logits.square().mean())


def test_frozen_parts(make_ours, tokens, rel):
    model, ids = make_ours().train(), tokens(2, 9)
    _, gradients = run(model, ids, labels=ids)
    model.lm_head.weight.requires_grad_(False)
    _, mine = run(model, ids, labels=ids)
    assert "lm_head.weight" not in mine
    assert all(torch.equal(mine[name], gradients[name]) for name in mine)
    model.requires_grad_(False)
    model.lm_head.weight.requires_grad_()
    _, mine = run(model, ids, labels=ids)
    assert list(mine) == ["lm_head.weight"] and torch.equal(mine["lm_head.weight"], gradients["lm_head.weight"])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("autocast", [False, True])
def test_16_bits(make_ours, tokens, rel, dtype, autocast):
    ids = tokens(2, 9)
    model = make_ours().train()
    if not autocast:
        model.to(dtype)
    with torch.autocast("cpu", dtype) if autocast else contextlib.nullcontext():
        expected, gradients = run(model, ids, labels=ids, skip_logits=False)
        actual, mine = run(model, ids, labels=ids)
    assert rel(actual.loss, expected.loss) < 1e-3
    assert rel(joined(mine), joined(gradients)) < 2e-2


@pytest.mark.parametrize("skip_logits", [False, True])
def test_kinds_of_labels(make_ours, tokens, skip_logits):
    model, ids = make_ours(), tokens(2, 9)
    call = lambda **given: model(ids, skip_logits=skip_logits, **given).loss  # noqa: E731
    assert torch.equal(call(labels=ids.int()), call(labels=ids))
    assert torch.equal(call(shift_labels=shifted(ids).int()), call(labels=ids))
    for name in ("labels", "shift_labels"):
        for dtype in (torch.int16, torch.float32):
            with pytest.raises(TypeError, match=rf"^{name} has dtype {str(dtype)[6:]}; it must be int64 or int32"):
                call(**{name: ids.to(dtype)})
    with pytest.raises(ValueError, match=r"shift_labels has shape \(2, 8\); it must be that of labels, \(2, 9\)"):
        call(labels=ids, shift_labels=ids[:, 1:])


@pytest.mark.parametrize("skip_logits", [False, True])
def test_padding_where_positions_are_kept(make_ours, tokens, skip_logits):
    model, ids = make_ours(), tokens(2, 9)
    mask = (torch.arange(9) < 6).long().expand(2, 9)
    kept = torch.arange(2, 7)
    loss = model(ids, attention_mask=mask, logits_to_keep=kept, labels=ids[:, kept], skip_logits=skip_logits).loss
    logits = model(ids, attention_mask=mask).logits[:, 2:5].flatten(0, 1)
    assert torch.allclose(loss, nn.functional.cross_entropy(logits, ids[:, 3:6].flatten()))


@pytest.mark.parametrize("train", [False, True])
def test_labels_out_of_range(make_ours, tokens, train):
    model, ids = make_ours().train(train), tokens(1, 5)
    for wrong in (61, -7):
        labels = ids.clone()
        labels[0, 3] = wrong
        message = rf"labels holds {wrong}; they must be from 0 to 60.* or ignore_index, -100"
        with pytest.raises(ValueError, match="^" + message):
            model(ids, labels=labels)
        with pytest.raises(ValueError, match=message):
            model(ids, shift_labels=labels)


@pytest.mark.parametrize("train", [False, True])
@pytest.mark.parametrize(
    "change, error, message",
    [
        ({"labels": [[1, 2]]}, TypeError, "labels is a list; it must be a tensor"),
        ({"num_items_in_batch": "5"}, TypeError, "num_items_in_batch is a str; it must be a number or a tensor"),
        ({"input_ids": torch.ones(2, 0, dtype=torch.long)}, ValueError, r"input_ids has shape \(2, 0\); seq must be"),
        (
            {"inputs_embeds": torch.ones(2, 0, 32), "input_ids": None},
            ValueError,
            r"inputs_embeds has shape \(2, 0, 32\)",
        ),
        ({"input_ids": torch.tensor([[1, 61]])}, ValueError, "input_ids holds 61; they must be from 0 to 60"),
        ({"input_ids": torch.tensor([[1, -1]])}, ValueError, "input_ids holds -1; they must be from 0 to 60"),
    ],
)
def test_other_arguments_are_named(make_ours, tokens, change, error, message, train):
    model, ids = make_ours().train(train), tokens(1, 2)
    with pytest.raises(error, match=message):
        model(**{"input_ids": ids, "labels": ids, **change})


def test_compiled_training_has_one_operator_for_it(make_ours, tokens):
    model, ids = make_ours().train(), tokens(2, 9)
    expected, gradients = run(model, ids, labels=ids)
    found = []

    def backend(graph, inputs):
        found.extend(node for node in graph.graph.nodes if "linear_cross_entropy" in str(node.target))
        return graph

    torch._dynamo.reset()
    model.zero_grad()
    output = torch.compile(model, fullgraph=True, backend=backend)(ids, labels=ids, num_items_in_batch=16)
    output.loss.backward()
    assert len(found) == 1 and output.logits is None
    assert torch.allclose(output.loss, expected.loss)
    for name, p in model.named_parameters():
        assert torch.allclose(p.grad, gradients[name], rtol=1e-4, atol=1e-6), name


def test_trainer(make_ours, tokens, tmp_path):
    """Training without logits; evaluation's metrics get them."""
    pytest.importorskip("accelerate")
    model, ids = make_ours(), tokens(8, 12)
    data = [{"input_ids": row, "labels": row} for row in ids]
    shapes, outputs = [], []
    model.register_forward_hook(lambda module, args, output: outputs.append((module.training, output.logits is None)))

    def compute_metrics(prediction):
        shapes.append(prediction.predictions.shape)
        return {}

    arguments = transformers.TrainingArguments(
        tmp_path, max_steps=3, per_device_train_batch_size=2, gradient_accumulation_steps=2, use_cpu=True,
        report_to=[], save_strategy="no", logging_steps=1, per_device_eval_batch_size=4, disable_tqdm=True,
    )  # fmt: skip
    trainer = transformers.Trainer(
        model, arguments, train_dataset=data, eval_dataset=data, compute_metrics=compute_metrics
    )
    trainer.train()
    evaluated = trainer.evaluate()["eval_loss"]
    assert shapes == [(8, 12, 61)]
    assert (True, True) in outputs and (True, False) not in outputs and (False, True) not in outputs
    with torch.no_grad():
        assert abs(model.eval()(ids, labels=ids).loss.item() - evaluated) < 1e-5
