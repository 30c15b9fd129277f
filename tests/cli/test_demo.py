from __future__ import annotations

import re

import pytest
import torch

from flash_xlstm.cli import demo, main
from flash_xlstm.training import checkpoint

SMALL = {"hidden_size": 128, "layers": 1, "heads": 2, "sequence_length": 32, "batch_size": 4}


@pytest.fixture
def run_demo(monkeypatch, text, tmp_path):
    """``run_demo()``: the exit code of a very short demo, and its folder."""
    monkeypatch.setattr(demo, "_CPU", SMALL)

    def run():
        arguments = ["--out", str(tmp_path / "demo"), "--data", str(text), "--seconds", "1.5", "--device", "cpu"]
        return main(["demo", *arguments]), tmp_path / "demo"

    return run


def test_trains_samples_and_agrees_with_transformers(run_demo, capsys):
    code, folder = run_demo()
    assert code == 0
    out = capsys.readouterr().out
    first, last, xz = re.search(r"byte: ([\d.]+) at the start, ([\d.]+) now; xz -9e: ([\d.]+)", out).groups()
    assert float(last) < 0.8 * float(first) and 0 < float(xz) < 8
    assert "\ndef " in out
    error = float(re.search(r"its logits differ by (\S+) relative, within 1e-04", out)[1])
    assert 0 <= error < 1e-4
    before = checkpoint.newest(folder)
    assert before is not None

    assert run_demo()[0] == 0  # again, replacing the old one
    assert len(list(folder.glob("checkpoint-*"))) == 1


def test_disagreement_with_transformers_fails(run_demo, capsys, monkeypatch):
    load = checkpoint.load_model

    def wrong(folder, **options):
        model = load(folder, **options)
        with torch.no_grad():
            model.lm_head.weight[0] += 0.01
        return model

    monkeypatch.setattr(checkpoint, "load_model", wrong)
    assert run_demo()[0] == 1
    assert "MORE THAN 1e-04" in capsys.readouterr().out
