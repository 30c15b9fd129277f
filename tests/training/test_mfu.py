from __future__ import annotations

import re

import pytest
import torch

from flash_xlstm import training
from flash_xlstm.models import xLSTMConfig, xLSTMForCausalLM
from flash_xlstm.training import mfu


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA H200", 989.4e12),
        ("NVIDIA H100 80GB HBM3", 989.4e12),
        ("NVIDIA GH200 480GB", 989.4e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA H200 NVL", 835.5e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA A100 80GB PCIe", 312e12),
        ("NVIDIA L4", 121e12),
        ("NVIDIA L40", None),
        ("NVIDIA A10G", None),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", None),
        ("Abacus", None),
    ],
)
def test_peaks(name, peak):
    assert mfu.peak_of(name) == peak


def test_no_name_has_two_peaks():
    names = ["B200", "H200", "GH200 96GB", "H100 80GB HBM3", "H100 NVL", "H100 PCIe", "A100-PCIE-40GB", "L40S", "A10"]
    for name in names:
        assert sum(re.fullmatch(pattern, name) is not None for pattern, _ in mfu.PEAKS) == 1, name


def test_other_devices_and_dtypes_have_no_peak(monkeypatch):
    assert mfu.peak_flops(torch.device("cpu"), torch.bfloat16) is None
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H200")
    assert mfu.peak_flops(torch.device("cuda"), torch.bfloat16) == 989.4e12
    assert mfu.peak_flops(torch.device("cuda"), torch.float32) is None


@pytest.mark.parametrize("tied", [False, True])
def test_flops_of_a_token(tied):
    config = xLSTMConfig(vocab_size=100, hidden_size=32, num_hidden_layers=2, num_heads=1, tie_word_embeddings=tied)
    model = xLSTMForCausalLM(config)
    blocks = sum(p.numel() for p in model.backbone.blocks.parameters())
    assert mfu.flops_per_token(model) == 6 * (blocks + 32 + 100 * 32)  # the output norm and the head


@pytest.mark.slow
def test_a_run_tells_its_share_of_the_peak(text, tmp_path, monkeypatch):
    settings = {"data": text, "hidden_size": 32, "layers": 1, "heads": 1, "sequence_length": 16, "batch_size": 2}
    settings |= {"steps": 4, "warmup": 1}
    options = {"device": "cpu", "log_every": 2}
    plain = training.start(settings, {**options, "out": tmp_path / "plain"})
    plain.run()
    assert not any("mfu" in row for row in plain.history)
    monkeypatch.setattr("flash_xlstm.training.trainer.peak_flops", lambda device, dtype: 1e9)
    trainer = training.start(settings, {**options, "out": tmp_path / "run"})
    trainer.run()
    rows = [row for row in trainer.history if "loss" in row]
    assert len(rows) == 2
    for row in rows:
        assert row["mfu"] == pytest.approx(mfu.flops_per_token(trainer.model) * row["tokens_per_s"] / 1e9)
    head, *lines = (tmp_path / "run" / "metrics.csv").read_text().splitlines()
    assert head.split(",")[-1] == "mfu" and float(lines[-1].split(",")[-1]) > 0
    assert training.resume({}, {"out": tmp_path / "run", "device": "cpu"}).step == 4
