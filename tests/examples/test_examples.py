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
