from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch

from flash_xlstm.cli import main
from flash_xlstm.training import checkpoint, shards


@pytest.fixture
def prepared(text, tmp_path):
    """The tiny run's text, prepared."""
    path = tmp_path / "prepared"
    assert main(["prepare", str(text), "--out", str(path), "--held-out", "1000", "--shard-tokens", "5000"]) == 0
    return path


def test_it_says_what_it_made(text, tmp_path, capsys):
    out = str(tmp_path / "out")
    assert main(["prepare", str(text), "--out", out, "--held-out", "1000"]) == 0
    printed = capsys.readouterr()
    assert "1 documents: 19,000 tokens to train on, 1,000 bytes held out; bytes; no end-of-text token" in printed.out
    assert f"flash-xlstm train --data {out}" in printed.out and "preparing: 100%" in printed.err
    assert main(["prepare", "--verify", "--out", out]) == 0
    printed = capsys.readouterr()
    assert f"{out} is whole" in printed.out and "verifying: 100%" in printed.err


def test_options_reach_the_data(tmp_path, capsys):
    (tmp_path / "a").write_text("".join(json.dumps({"body": f"document {n}"}) + "\n" for n in range(50)))
    arguments = [
        "prepare",
        str(tmp_path / "a"),
        "--out",
        str(tmp_path / "out"),
        "--format",
        "jsonl",
        "--held-out",
        "20",
    ]
    assert main([*arguments, "--field", "body"]) == 0
    assert "50 documents: " in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "no INPUT; give a file or a folder"),
        (["INPUT", "--verify"], "--verify checks OUT alone; it takes no INPUT"),
        (["nothing"], "no data: nothing does not exist"),
        (["INPUT", "--format", "jsonl"], "line 1: it is not JSON"),
        (["INPUT", "--end-of-text", "</s>"], "--end-of-text </s> needs a --tokenizer"),
        (["INPUT", "--separator", ""], "--separator is ''; it must have"),
        (["--verify"], "corrupt data"),
    ],
)
def test_errors_are_one_line(text, tmp_path, error_line, arguments, message):
    arguments = [str(text) if argument == "INPUT" else argument for argument in arguments]
    assert main(["prepare", *arguments, "--out", str(tmp_path / "out")]) == 2
    assert message in error_line()
    assert not (tmp_path / "out").exists()


def test_a_killed_run_leaves_no_data(tmp_path):
    """The input never ends, so that the process is killed while it writes."""
    pipe, out = tmp_path / "pipe", tmp_path / "out"
    pipe.mkdir()
    (pipe / "text").write_bytes(b"x" * 100)
    code = """
import sys, time
from flash_xlstm.training import documents
def endless(*args):
    while True:
        yield documents.Piece(b"x" * 100_000, False, "")
        time.sleep(0.001)
from flash_xlstm.training import shards
shards.pieces = endless
from flash_xlstm.cli import main
sys.exit(main(sys.argv[1:]))
"""
    arguments = ["prepare", str(pipe), "--out", str(out), "--shard-tokens", "1000000"]
    process = subprocess.Popen([sys.executable, "-c", code, *arguments], stderr=subprocess.PIPE)
    partial = tmp_path / ".out.partial"
    while not (partial / "train-00002.tokens").exists():
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert not out.exists() and partial.is_dir()
    assert main(["prepare", str(pipe), "--out", str(out), "--held-out", "10"]) == 0
    assert not partial.exists() and shards.verify(out).train.tokens == 90


@pytest.mark.slow
def test_killed_and_resumed_equals_uninterrupted(prepared, train, start, resume, weights, tmp_path):
    options = ["--data", str(prepared), "--steps", 20, "--save-every", 2, "--accumulate", 2]
    assert train(*options, out="whole")[0] == 0
    process = start(*options)
    run = tmp_path / "run"
    while checkpoint.newest(run) is None:
        assert process.poll() is None, process.communicate()
        time.sleep(0.002)
    process.kill()
    process.wait()
    assert int(checkpoint.newest(run).name.removeprefix("checkpoint-")) < 20
    assert resume()[0] == 0
    first, second = weights(run), weights(tmp_path / "whole")
    assert first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)
    assert main(["generate", str(run), "1: the", "--max-new-tokens", "5", "--device", "cpu"]) == 0


def test_settings_of_prepared_data_are_named(prepared, train, error_line):
    assert train("--data", prepared, "--held-out", 5)[0] == 2
    assert "--held-out does not apply to prepared data" in error_line()


def test_the_bar_tells_speed_and_use_of_the_device(train, monkeypatch, capsys):
    monkeypatch.setattr("flash_xlstm.training.trainer.peak_flops", lambda device, dtype: 1e12)
    assert train("--steps", 10)[0] == 0
    bar = capsys.readouterr().err
    assert "tokens/s" in bar and "% MFU" in bar and "loss " in bar and "<" in bar
