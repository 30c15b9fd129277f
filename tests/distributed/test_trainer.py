"""``flash-xlstm train`` on several processes: the run of one process, but for rounding."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from torch import distributed as dist

training = pytest.importorskip("flash_xlstm.training")
for _package in ("matplotlib", "tokenizers"):
    pytest.importorskip(_package)

SETTINGS = {"hidden_size": 32, "layers": 2, "heads": 2, "sequence_length": 16, "batch_size": 4, "accumulate": 2}
SETTINGS |= {"steps": 6, "warmup": 2, "held_out": 64}


@pytest.fixture
def data(tmp_path):
    path = tmp_path / "text.txt"
    path.write_bytes(bytes(range(32, 127)) * 60)
    return {**SETTINGS, "data": str(path)}


def _train(settings, out, options=None, resumed=False):
    begin = training.resume if resumed else training.start
    trainer = begin(settings, {"out": out, "device": "cpu", "eval_every": 3, "log_every": 1, **(options or {})})
    result = trainer.run()
    return result.ended, trainer.step, trainer.history


def _close(found, wanted):
    for row, right in zip(found, wanted, strict=True):
        assert row.keys() == right.keys()
        for name in row.keys() - {"tokens_per_s"}:
            assert row[name] == pytest.approx(right[name], rel=1e-4), name


def _weights(out):
    return training.load_model(training.newest(Path(out))).state_dict()


@pytest.mark.parametrize("shard", [False, True])
def test_the_run_of_one_process(on_ranks, tmp_path, data, shard):
    ended, step, history = _train(data, str(tmp_path / "one"))
    results = on_ranks(2, _train, data, str(tmp_path / "two"), {"shard": shard})
    assert (ended, step) == ("steps", 6) and all(result[:2] == (ended, step) for result in results)
    for _, _, found in results:
        _close(found, history)
    one, two = _weights(tmp_path / "one"), _weights(tmp_path / "two")
    for name, weight in one.items():
        torch.testing.assert_close(two[name], weight, rtol=1e-3, atol=1e-5)
    config = json.loads((training.newest(tmp_path / "two") / "config.json").read_text())
    assert config["architectures"] == ["xLSTMForCausalLM"]
    assert (tmp_path / "two" / "loss.png").is_file()


def _stopped(settings, out, options):
    """Stopped by a signal that one of the processes gets."""
    trainer = training.start(settings, {"out": out, "device": "cpu", "log_every": 1, **options})
    stepped = trainer._after_step

    def stop(progress):
        stepped(progress)
        if trainer.step == 3 and dist.get_rank() == 1:
            os.kill(os.getpid(), signal.SIGTERM)

    trainer._after_step = stop
    return trainer.run().ended, trainer.step


@pytest.mark.parametrize(("first", "then"), [((2, True), (4, True)), ((4, False), (2, True)), ((2, True), (1, False))])
def test_stopped_and_resumed_on_others(on_ranks, tmp_path, data, first, then):
    _, _, history = _train(data, str(tmp_path / "one"), {"eval_every": 0})
    out = str(tmp_path / "out")
    assert on_ranks(first[0], _stopped, data, out, {"shard": first[1]}) == [("signal", 3)] * first[0]
    options = {"shard": then[1], "eval_every": 0}
    if then[0] == 1:
        found = _train({}, out, options, resumed=True)
    else:
        found = on_ranks(then[0], _train, {}, out, options, True)[1]
    assert found[:2] == ("steps", 6)
    _close(found[2], history)


def _refused(settings, out, options):
    with pytest.raises(training.TrainingError) as raised:
        training.start(settings, {"out": out, "device": "cpu", **options})
    return str(raised.value)


def _memory(settings, out):
    """10 bytes a parameter: too little for all of weights, gradients and moments, and enough for half of them."""
    from flash_xlstm.training import setup

    size = sum(p.numel() for p in training.start(settings, {"out": out, "device": "cpu"}).model.parameters())
    setup._machine_memory = lambda: 10 * size
    training.start(settings, {"out": out, "device": "cpu", "shard": True})
    with pytest.raises(training.TrainingError, match="not enough memory: a model of"):
        training.start(settings, {"out": out, "device": "cpu"})


def test_memory(on_ranks, tmp_path, data):
    on_ranks(2, _memory, {**data, "hidden_size": 128}, str(tmp_path / "out"))


def test_refused(on_ranks, tmp_path, data):
    said = on_ranks(2, _refused, {**data, "batch_size": 3}, str(tmp_path / "out"), {})
    assert all("`batch_size` is 3; it must be a multiple of the 2 processes" in text for text in said)
    assert "`shard` is for several processes" in _refused(data, str(tmp_path / "out"), {"shard": True})


def _torchrun(out, data, *options):
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "--max-restarts", "1",
        "-m", "flash_xlstm.cli", "train", "--device", "cpu", "--threads", "1", "--out", str(out), *options,
        *(text for name, value in data.items() for text in (f"--{name.replace('_', '-')}", str(value))),
    ]  # fmt: skip
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def _workers(parent):
    """The processes that torchrun started."""
    return [int(pid) for pid in Path(f"/proc/{parent}/task/{parent}/children").read_text().split()]


@pytest.mark.slow
def test_killed_under_torchrun(on_ranks, tmp_path, data):
    """The command line, of which a process is killed in mid-run: torchrun starts both again, and nothing is lost."""
    data["steps"] = 100
    _, _, history = on_ranks(2, _train, data, str(tmp_path / "whole"), {"shard": True, "eval_every": 0, "threads": 1})[
        0
    ]
    out, end = tmp_path / "out", time.monotonic() + 200
    run = _torchrun(out, data, "--shard", "--save-every", "10", "--log-every", "1")
    try:
        while not training.newest(out) and time.monotonic() < end and run.poll() is None:
            time.sleep(0.02)
        assert run.poll() is None and training.newest(out) is not None, run.communicate()[0]
        os.kill(_workers(run.pid)[-1], signal.SIGKILL)
        said, _ = run.communicate(timeout=200)
    finally:
        run.kill()
    assert run.returncode == 0, said
    assert said.count("starting at step 0") == 1 and said.count("resuming at step") == 1, said
    saved = training.load_state(training.newest(out))
    assert saved["step"] == 100
    for row, right in zip(saved["history"], history, strict=True):
        assert {**row, "tokens_per_s": 0} == {**right, "tokens_per_s": 0}
