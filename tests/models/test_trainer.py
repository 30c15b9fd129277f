"""transformers' Trainer, PEFT and TRL train the model: packed, checkpointed, with gradients of several batches."""

from __future__ import annotations

import os

import pytest
import torch
import torch.nn.functional as F
from transformers import DataCollatorWithFlattening, PreTrainedTokenizerFast, Trainer, TrainingArguments

from flash_xlstm.models import xLSTMForCausalLM

accelerate = pytest.importorskip("accelerate", reason="accelerate, which transformers' Trainer needs, is not installed")

LENGTHS = (5, 9, 1, 12, 7, 20, 3, 8)
FLATTENING = {"positions": {}, "offsets": {"return_flash_attn_kwargs": True, "return_seq_idx": True}}
TARGETS = {
    "single": ["q", "k", "v", "ogate_preact", "out_proj", "proj_up_gate", "proj_up", "proj_down"],
    "fused": ["qkv_opreact", "out_proj", "proj_up_gate_z", "proj_down"],
}


@pytest.fixture(autouse=True)
def leave_nothing_behind():
    """TrainingArguments set environment variables, and accelerate keeps one state for the process."""
    before = dict(os.environ)
    yield
    os.environ.clear()
    os.environ.update(before)
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture
def documents(tokens):
    return [{"input_ids": tokens(1, n, seed=n)[0].tolist()} for n in LENGTHS]


def padded(features):
    """Each document in a row of its own."""
    rows = [torch.tensor(f["input_ids"]) for f in features]
    pad = lambda rows, value: torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=value)  # noqa: E731
    return {
        "input_ids": pad(rows, 0),
        "attention_mask": pad([torch.ones_like(row) for row in rows], 0),
        "labels": pad(rows, -100),
    }


@pytest.fixture
def make_trainer(tmp_path, documents):
    def make(model, collator=padded, **options):
        evaluation = {name: options.pop(name) for name in ("compute_metrics", "eval_dataset") if name in options}
        options = {"per_device_train_batch_size": 4, "max_steps": 3, "optim": "sgd", "learning_rate": 0.1, **options}
        arguments = TrainingArguments(
            tmp_path / "out", use_cpu=True, report_to="none", disable_tqdm=True, save_strategy="no", logging_steps=1,
            **options,
        )  # fmt: skip
        return Trainer(model, arguments, train_dataset=documents, data_collator=collator, **evaluation)

    return make


def losses(trainer):
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def same_weights(model, other, tolerance=2e-6):
    other = other.state_dict()
    for name, value in model.state_dict().items():
        assert torch.allclose(value, other[name], rtol=1e-4, atol=tolerance), name


@pytest.mark.parametrize("flattening", FLATTENING.values(), ids=FLATTENING)
@pytest.mark.parametrize("checkpointing", [None, False, True], ids=["kept", "not reentrant", "reentrant"])
def test_packed_training_is_that_of_separate_rows(make_ours, make_trainer, flattening, checkpointing):
    options = {}
    if checkpointing is not None:
        options = {
            "gradient_checkpointing": True,
            "gradient_checkpointing_kwargs": {"use_reentrant": checkpointing},
        }
    models = [make_ours() for _ in range(3)]
    make_trainer(models[1]).train()
    trainer = make_trainer(models[2], DataCollatorWithFlattening(**flattening), **options)
    trainer.train()
    same_weights(models[2], models[1])
    assert not torch.equal(models[2].lm_head.weight, models[0].lm_head.weight)
    assert all(p.grad is None or p.grad.isfinite().all() for p in models[2].parameters())
    assert losses(trainer)[0] > losses(trainer)[-1]


@pytest.mark.slow
def test_compiled_packed_training(make_ours, make_trainer):
    models = [make_ours(), make_ours()]
    make_trainer(models[0]).train()
    torch._dynamo.reset()
    options = {"torch_compile": True, "torch_compile_backend": "aot_eager"}
    trainer = make_trainer(models[1], DataCollatorWithFlattening(**FLATTENING["offsets"]), **options)
    trainer.train()
    assert isinstance(trainer.model_wrapped, torch._dynamo.OptimizedModule)
    same_weights(models[1], models[0])
    with pytest.raises(RuntimeError, match="told there by cu_seq_lens_q"):
        make_trainer(make_ours(), DataCollatorWithFlattening(), **options).train()


@pytest.mark.parametrize("flattening", [None, {}, FLATTENING["offsets"]], ids=["padded", *FLATTENING])
def test_accumulated_batches_are_one_batch(make_ours, make_trainer, flattening):
    """Batches of 2 documents, of other numbers of tokens each, which `num_items_in_batch` weighs."""
    collator = padded if flattening is None else DataCollatorWithFlattening(**flattening)
    models = [make_ours(), make_ours()]
    whole = make_trainer(models[0], collator, per_device_train_batch_size=8)
    parts = make_trainer(models[1], collator, per_device_train_batch_size=2, gradient_accumulation_steps=4)
    for trainer in (whole, parts):
        trainer.train()
    same_weights(*models)
    assert losses(parts) == pytest.approx(losses(whole), rel=1e-3)  # they are logged with four figures


@pytest.mark.parametrize("collator", [padded, DataCollatorWithFlattening()], ids=["padded", "packed"])
def test_evaluation_gets_logits(make_ours, make_trainer, documents, rel, collator):
    seen = {}

    def metrics(prediction):
        seen["logits"], seen["labels"] = torch.tensor(prediction.predictions), torch.tensor(prediction.label_ids)
        return {"correct": float((seen["logits"][:, :-1].argmax(-1) == seen["labels"][:, 1:]).float().mean())}

    model = make_ours()
    options = {"per_device_eval_batch_size": 8, "compute_metrics": metrics, "eval_dataset": documents}
    found = make_trainer(model, collator, **options).evaluate()
    batch = collator(documents)
    with torch.no_grad():
        output = model(**batch)
    assert rel(seen["logits"], output.logits) < 1e-6 and torch.equal(seen["labels"], batch["labels"])
    assert found["eval_loss"] == pytest.approx(float(output.loss), rel=1e-4) and "eval_correct" in found


def test_label_smoothing(make_ours, make_trainer):
    trainer = make_trainer(make_ours(), DataCollatorWithFlattening(), label_smoothing_factor=0.1)
    trainer.train()
    assert losses(trainer)[0] > losses(trainer)[-1]


# --- PEFT ---


@pytest.mark.parametrize("weight_mode", ["single", "fused"])
@pytest.mark.parametrize("reentrant", [None, False, True], ids=["kept", "not reentrant", "reentrant"])
def test_lora(make_ours, make_trainer, tokens, rel, tmp_path, weight_mode, reentrant):
    peft = pytest.importorskip("peft", reason="peft is not installed")
    config = peft.LoraConfig(target_modules=TARGETS[weight_mode], r=2, task_type="CAUSAL_LM")
    base, model = make_ours(weight_mode=weight_mode), make_ours(weight_mode=weight_mode)
    expected = base(tokens(2, 9)).logits
    model = peft.get_peft_model(model, config)
    options = {}
    if reentrant is not None:
        model.enable_input_require_grads()
        options = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": reentrant}}
    trainer = make_trainer(model, DataCollatorWithFlattening(**FLATTENING["offsets"]), max_steps=4, **options)
    trainer.train()
    assert losses(trainer)[0] > losses(trainer)[-1]
    for name, p in model.named_parameters():  # each adapter learns, and nothing else
        assert p.requires_grad == ("lora_" in name) and (not p.requires_grad or p.any()), name
    for name, value in base.state_dict().items():
        parts = name.split(".")
        wrapped = ".".join([*parts[:-1], "base_layer", parts[-1]]) if parts[-2] in TARGETS[weight_mode] else name
        assert torch.equal(model.get_base_model().state_dict()[wrapped], value), name
    model.eval()
    tuned = model(tokens(2, 9)).logits
    assert rel(tuned, expected) > 1e-3
    with model.disable_adapter():
        assert rel(model(tokens(2, 9)).logits, expected) < 1e-6
    trainer.save_model(tmp_path / "adapter")
    again = peft.PeftModel.from_pretrained(make_ours(weight_mode=weight_mode), tmp_path / "adapter").eval()
    assert rel(again(tokens(2, 9)).logits, tuned) < 1e-6
    merged = again.merge_and_unload()
    assert rel(merged(tokens(2, 9)).logits, tuned) < 1e-5
    merged.save_pretrained(tmp_path / "merged")
    assert rel(xLSTMForCausalLM.from_pretrained(tmp_path / "merged")(tokens(2, 9)).logits, tuned) < 1e-5


# --- TRL ---


@pytest.fixture
def tokenizer():
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = {word: number for number, word in enumerate(["<pad>", "<eos>", "<unk>", *(f"w{n}" for n in range(3, 61))])}
    fast = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    fast.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=fast, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>")


@pytest.fixture
def make_sft(tokenizer, documents, tmp_path):
    trl = pytest.importorskip("trl", reason="trl is not installed")
    datasets = pytest.importorskip("datasets", reason="datasets is not installed")
    texts = datasets.Dataset.from_list([{"text": " ".join(f"w{n}" for n in d["input_ids"])} for d in documents])

    def make(model, **options):
        arguments = trl.SFTConfig(
            tmp_path / "sft", use_cpu=True, report_to="none", disable_tqdm=True, save_strategy="no", logging_steps=1,
            per_device_train_batch_size=4, max_steps=4, learning_rate=1e-2, bf16=False, **{"max_length": 32, **options},
        )  # fmt: skip
        return trl.SFTTrainer(model, arguments, train_dataset=texts, eval_dataset=texts, processing_class=tokenizer)

    return make


SFT = {
    "padded": {},
    "padding free": {"padding_free": True, "max_length": None},
    "bfd": {"packing": True},
    "bfd_split": {"packing": True, "packing_strategy": "bfd_split"},
    "wrapped": {"packing": True, "packing_strategy": "wrapped"},
}


@pytest.mark.parametrize("options", SFT.values(), ids=SFT)
def test_trl(make_ours, make_sft, options):
    model = make_ours()
    trainer = make_sft(model, **options)
    batch = trainer.data_collator([trainer.train_dataset[n] for n in range(len(trainer.train_dataset))])
    ids = batch["input_ids"]
    if "position_ids" in batch:
        rows = ids[0].split(batch["cu_seq_lens_q"].diff().tolist())
        assert len(rows) == len(LENGTHS)
    else:
        rows = [row[mask > 0] for row, mask in zip(ids, batch["attention_mask"], strict=True)]
    with torch.no_grad():
        each = [F.cross_entropy(model(row[None]).logits[0, :-1], row[1:], reduction="sum") for row in rows]
        expected = float(sum(each) / sum(len(row) - 1 for row in rows))
        for loss in (trainer.compute_loss(model, dict(batch)), model(**batch).loss):
            assert float(loss) == pytest.approx(expected, rel=1e-5)
    trainer.train()
    assert losses(trainer)[0] > losses(trainer)[-1]
    assert trainer.evaluate()["eval_loss"] < expected


def test_trl_with_adapters_and_checkpointing(make_ours, make_sft):
    peft = pytest.importorskip("peft", reason="peft is not installed")
    config = peft.LoraConfig(target_modules=TARGETS["single"], r=2, task_type="CAUSAL_LM")
    options = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": False}}
    trainer = make_sft(peft.get_peft_model(make_ours(), config), packing=True, **options)
    trainer.train()
    assert losses(trainer)[0] > losses(trainer)[-1]
