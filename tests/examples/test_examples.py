"""Each example tells its options, and ends well in a small form."""

from __future__ import annotations

import re
import runpy
from pathlib import Path

import pytest

for _package in ("transformers", "tqdm", "matplotlib", "peft"):
    pytest.importorskip(_package)

EXAMPLES = Path(__file__).parents[2] / "examples"
NAMES = sorted(path.stem for path in EXAMPLES.glob("*.py"))


@pytest.mark.parametrize("name", NAMES)
def test_help(name, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", [name, "--help"])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")
    assert ended.value.code == 0
    assert "--" in capsys.readouterr().out
    text = (EXAMPLES / f"{name}.py").read_text()
    assert text.startswith('"""') and f"examples/{name}.py" in text.split('"""')[1]  # how to run it


@pytest.mark.parametrize("name", NAMES)
def test_wrong_options_are_refused_by_name(name, load_example, monkeypatch, capsys):
    example = load_example(name)
    text = (EXAMPLES / f"{name}.py").read_text()
    counts = [flag for flag in ("--steps", "--batch", "--tokens") if f'"{flag}"' in text]
    wrong = [(flag, value) for flag in counts for value in ("0", "-3", "many")]
    assert wrong
    if '"--device"' in text:
        wrong += [("--device", "nonsense"), ("--device", "meta")]
    required, parse = [], getattr(example, "main", None)
    if name == "train_on_many_gpus":
        required, parse = ["--data", "file", "--out", "folder"], example.parse
    for option in wrong:
        monkeypatch.setattr("sys.argv", [name, *required, *option])
        with pytest.raises(SystemExit) as ended:
            parse()
        assert ended.value.code == 2
        assert f"argument {option[0]}: " in capsys.readouterr().err


def test_lora(load_example, tmp_path, capsys):
    """The adapter learns the other form, the base model is what it was, and the merged model is the tuned one."""
    sizes = ["--base-steps", "30", "--steps", "40", "--batch", "8"]
    assert load_example("lora").main(["--out", str(tmp_path), *sizes]) == 0
    out = capsys.readouterr().out
    before, after = map(float, re.search(r"([\d.]+) before, ([\d.]+) after", out).groups())
    without, loaded = map(float, re.search(r"adapter ([\d.]+); .* again ([\d.]+)", out).groups())
    assert after < 0.8 * before and without == before and loaded == after
    assert (tmp_path / "adapter" / "adapter_model.safetensors").exists()


def test_prefix_caching(load_example, tmp_path, capsys):
    """Every question's answer from the kept state is the one with everything read anew."""
    import torch

    example = load_example("prefix_caching")
    assert example.main(["--state", str(tmp_path / "state"), "--tokens", "500", "--new-tokens", "5"]) == 0
    assert "the same both ways" in capsys.readouterr().out
    torch.manual_seed(1)
    no_special = dict.fromkeys(("pad_token_id", "bos_token_id", "eos_token_id"))
    config = example.xLSTMConfig(vocab_size=50, hidden_size=32, num_hidden_layers=2, num_heads=2, **no_special)
    model = example.xLSTMForCausalLM(config).eval()
    prefix, questions = torch.randint(50, (70,)), [torch.randint(50, (n,)) for n in (3, 9, 1)]
    example.read_prefix(model, prefix, tmp_path / "state")
    answers = example.answer(model, tmp_path / "state", questions, 8)
    for question, given in zip(questions, answers, strict=True):
        assert torch.equal(given, example.answer_anew(model, prefix, question, 8))


def test_classification(load_example, tmp_path, capsys):
    """It learns, beside padding that does not reach the logits."""
    load_example("classification").main(["--steps", "60", "--batch", "16", "--width", "32", "--out", str(tmp_path)])
    out = capsys.readouterr().out
    assert float(re.search(r"([\d.]+)% of 256", out)[1]) > 45  # chance is 25
    assert float(re.search(r"logits by (\S+)", out)[1]) < 1e-4
    assert (tmp_path / "model.safetensors").exists()


def test_classification_says_why_it_failed(load_example, capsys):
    assert load_example("classification").main(["--steps", "1", "--batch", "1", "--width", "32"]) == 1
    assert "not more than the 90% expected" in capsys.readouterr().out


def test_classification_without_the_mask_depends_on_padding(load_example):
    """The mask is what keeps padding out: the check that the example prints can fail."""
    import torch

    example = load_example("classification")
    torch.manual_seed(0)
    config = example.xLSTMConfig(
        vocab_size=41, hidden_size=32, num_hidden_layers=1, num_heads=2, num_labels=4, pad_token_id=0
    )
    model = example.xLSTMForSequenceClassification(config).eval()
    ids, mask, classes = example.batch_of(4, torch.Generator().manual_seed(0))
    assert example.effect_of_padding(model, ids, mask) < 1e-5
    left = [
        torch.cat([torch.zeros(40 - n, dtype=torch.int64), row[:n]]) for row, n in zip(ids, mask.sum(1), strict=True)
    ]
    ids = torch.stack(left)
    with torch.no_grad():
        masked, unmasked = (model(ids, attention_mask=m).logits for m in ((ids != 0).long(), None))
    assert (masked - unmasked).abs().max() > 1e-4
    assert set(classes.tolist()) <= set(range(4))


def test_tagging(load_example, capsys):
    """Reading from the left alone tells nothing about the next mark."""
    assert load_example("tagging").main(["--steps", "40", "--batch", "16", "--width", "16"]) == 0
    shares = [float(share) for share in re.findall(r"([\d.]+)% of the tags", capsys.readouterr().out)]
    assert shares[0] < 65 and shares[1] > 80


def test_tags_are_the_next_mark(load_example):
    import torch

    example = load_example("tagging")
    ids, padding, tags = example.batch_of(3, torch.Generator().manual_seed(0))
    for row, gone, mine in zip(ids.tolist(), padding.tolist(), tags.tolist(), strict=True):
        for t, tag in enumerate(mine):
            if gone[t] or row[t] < 2:
                assert tag == -100
            else:
                assert tag == next(x for x in row[t:] if x < 2)
