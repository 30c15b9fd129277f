"""Classification heads: each row comes out as without padding; saving, loading and training."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from transformers import DataCollatorForTokenClassification, DataCollatorWithPadding, Trainer, TrainingArguments

from flash_xlstm.models import xLSTMForCausalLM, xLSTMForSequenceClassification, xLSTMForTokenClassification

LENGTHS = (7, 1, 12, 4)
HEADS = [xLSTMForSequenceClassification, xLSTMForTokenClassification]


@pytest.fixture
def make(make_ours):
    """``make(head, **config)``: a classifier with the random weights of `make_ours`."""

    def build(head, **config):
        lm = make_ours(num_labels=3, pad_token_id=0, **config)
        torch.manual_seed(0)
        model = head(copy.deepcopy(lm.config))
        model.backbone.load_state_dict(lm.backbone.state_dict())
        return model.eval()

    return build


@pytest.fixture
def rows(tokens):
    return [tokens(1, length, seed=length)[0] for length in LENGTHS]


def padded(rows, side):
    left = side == "left"
    pad = lambda row: F.pad(row, (max(LENGTHS) - len(row), 0) if left else (0, max(LENGTHS) - len(row)))  # noqa: E731
    return torch.stack([pad(row) for row in rows]), torch.stack([pad(torch.ones_like(row)) for row in rows])


def labels_of(head, rows):
    if head is xLSTMForSequenceClassification:
        return torch.tensor([2, 0, 1, 2])
    return torch.cat([row % 3 for row in rows])


def loss_and_gradients(model, logits, labels):
    model.zero_grad()
    loss = F.cross_entropy(logits, labels)
    loss.backward()
    return [logits, loss, *(p.grad.clone() for p in model.parameters())]


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("double", [False, True], ids=["float32", "float64"])
def test_rows_come_out_as_alone(make, in_double, rows, rel, head, side, double):
    model, labels = make(head), labels_of(head, rows)
    model, bound = (in_double(model), 1e-9) if double else (model, 2e-4)
    alone = torch.cat([model(row[None]).logits.flatten(0, -2) for row in rows])
    expected = loss_and_gradients(model, alone, labels)
    ids, mask = padded(rows, side)
    given = labels if head is xLSTMForSequenceClassification else mask.new_full(mask.shape, -100)
    if head is xLSTMForTokenClassification:
        given[mask.bool()] = labels
    output = model(ids, attention_mask=mask, labels=given)
    logits = output.logits if head is xLSTMForSequenceClassification else output.logits[mask.bool()]
    actual = loss_and_gradients(model, logits, labels)
    assert torch.allclose(output.loss.double(), expected[1].double(), rtol=1e-5)
    assert rel(logits, alone) < 1e-5
    for got, want in zip(actual, expected, strict=True):
        assert rel(got, want) < bound


def test_packed_documents_of_tokens(make, rows, rel):
    model = make(xLSTMForTokenClassification)
    offsets = F.pad(torch.tensor(LENGTHS).cumsum(0), (1, 0)).int()
    logits = model(torch.cat(rows)[None], cu_seq_lens_q=offsets).logits
    assert rel(logits, torch.cat([model(row[None]).logits for row in rows], 1)) < 1e-5


def test_a_row_of_several_documents_has_no_class(make, rows):
    model = make(xLSTMForSequenceClassification)
    row, offsets = torch.cat(rows)[None], F.pad(torch.tensor(LENGTHS).cumsum(0), (1, 0)).int()
    numbers = torch.cat([torch.full((n,), 1 + at) for at, n in enumerate(LENGTHS)])[None]
    for packing in ({"cu_seq_lens_q": offsets}, {"attention_mask": numbers}):
        with pytest.raises(ValueError, match="a row gets one class; give each document a row"):
            model(row, **packing)
    assert model(row, cu_seq_lens_q=offsets[[0, -1]]).logits.shape[0] == 1


@pytest.mark.parametrize("head", HEADS)
def test_outputs_carry_what_transformers_reads(make, tokens, head):
    model, ids = make(head), tokens(1, 5)
    plain = model(ids, output_hidden_states=True)
    assert plain.attentions is None and len(plain.hidden_states) == 3 and set(plain) == {"logits", "hidden_states"}
    if head is xLSTMForSequenceClassification:
        output = model(ids, use_cache=True)
        cache = output.cache if hasattr(output, "cache") else output.past_key_values  # transformers 5.17's
        assert cache.get_seq_length() == 5 and {*output} - {"logits"} <= {*model.config.keys_to_ignore_at_inference}
    assert model(ids, return_dict=False)[0].equal(plain.logits)
    with pytest.raises(TypeError, match="wrong is no argument of the model"):
        model(ids, wrong=1)


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("mode", ["single", "fused"])
def test_saving_and_loading(make, make_ours, tokens, rel, tmp_path, head, mode):
    model, ids = make(head, weight_mode=mode), tokens(1, 9)
    model.save_pretrained(tmp_path / "classifier")
    for wanted in ("single", "fused"):
        loaded = head.from_pretrained(tmp_path / "classifier", weight_mode=wanted).eval()
        assert loaded.config.architectures == [head.__name__]
        assert rel(loaded(ids).logits, model(ids).logits) < 1e-6
    lm = make_ours(weight_mode=mode)
    lm.save_pretrained(tmp_path / "lm")
    begun = head.from_pretrained(tmp_path / "lm", num_labels=5).eval()
    assert begun(ids).logits.shape[-1] == 5
    assert rel(begun.backbone(ids).last_hidden_state, lm.backbone(ids, use_cache=False).last_hidden_state) < 1e-6
    assert xLSTMForCausalLM.from_pretrained(tmp_path / "classifier").config.num_labels == 3  # a head of its own


@pytest.mark.parametrize("head", HEADS)
def test_trainer(make, rows, tmp_path, monkeypatch, head):
    accelerate = pytest.importorskip("accelerate", reason="accelerate, which transformers' Trainer needs")
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    vocabulary = {str(n): n for n in range(61)}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(vocabulary, "1")), pad_token="0", padding_side="left"
    )  # fmt: skip
    model, classes = make(head), labels_of(head, rows)
    if head is xLSTMForSequenceClassification:
        collator, labels = DataCollatorWithPadding(tokenizer), classes.tolist()
    else:
        collator, labels = (
            DataCollatorForTokenClassification(tokenizer),
            [part.tolist() for part in classes.split(LENGTHS)],
        )
    data = [{"input_ids": row.tolist(), "labels": label} for row, label in zip(rows, labels, strict=True)]
    arguments = TrainingArguments(
        tmp_path, use_cpu=True, report_to="none", disable_tqdm=True, save_strategy="no", max_steps=20,
        per_device_train_batch_size=2, gradient_accumulation_steps=2, per_device_eval_batch_size=2, learning_rate=3e-3,
    )  # fmt: skip
    seen = []
    metrics = lambda prediction: seen.append(prediction) or {}  # noqa: E731
    trainer = Trainer(
        model, arguments, train_dataset=data, eval_dataset=data, data_collator=collator, compute_metrics=metrics
    )  # fmt: skip
    before = trainer.evaluate()["eval_loss"]
    assert not trainer.model_accepts_loss_kwargs  # the loss is that of an accumulated batch, to be divided
    trainer.train()
    assert trainer.evaluate()["eval_loss"] < 0.5 * before
    assert all(isinstance(got.predictions, type(got.label_ids)) and got.predictions.shape[-1] == 3 for got in seen)
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
