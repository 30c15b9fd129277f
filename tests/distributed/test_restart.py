"""A run under torchrun of which a process is killed goes on from its last checkpoint, with nothing lost."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
STEPS, SAVE_EVERY, KILLED_AT = 7, 2, 5

# The example, of which a rank kills itself within a step of the first attempt; rank 0 writes down all losses.
SCRIPT = f"""
import importlib.util, json, os, signal, sys, torch
torch.set_num_threads(1)
spec = importlib.util.spec_from_file_location("example", {str(ROOT / "examples" / "train_on_many_gpus.py")!r})
example = importlib.util.module_from_spec(spec)
spec.loader.exec_module(example)
out, killed, *rest = sys.argv[1:]
begun, steps, batch_of = example.newest(out), 0, example.batch_of

def counted(*args):
    global steps
    steps += 1
    if os.environ["TORCHELASTIC_RESTART_COUNT"] == "0" and os.environ["RANK"] == killed and steps == {KILLED_AT}:
        os.kill(os.getpid(), signal.SIGKILL)
    return batch_of(*args)

example.batch_of = counted
losses = example.train(example.parse([*rest, "--out", out]))
if os.environ["RANK"] == "0":
    done = {{"losses": losses, "steps": steps, "begun": begun and begun.name}}
    open(os.path.join(out, "done.json"), "w").write(json.dumps(done))
"""


@pytest.mark.parametrize("mesh", ["dp_shard=2"])
def test_killed_in_mid_run(tmp_path, mesh):
    (tmp_path / "script.py").write_text(SCRIPT)
    (tmp_path / "data").write_bytes(bytes(range(256)) * 20)
    results = {}
    for killed in ("none", "1"):
        command = [
            sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
            "--max-restarts", "1", str(tmp_path / "script.py"), str(tmp_path / killed), killed,
            "--data", str(tmp_path / "data"),
            "--mesh", mesh, "--steps", str(STEPS), "--save-every", str(SAVE_EVERY), "--batch", "2", "--sequence", "16",
            "--hidden", "32", "--layers", "2",
        ]  # fmt: skip
        (tmp_path / killed).mkdir()
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
        environment["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"  # else a restart reads what the attempt before wrote
        ran = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)
        assert ran.returncode == 0, ran.stderr
        results[killed] = json.loads((tmp_path / killed / "done.json").read_text())
    whole, restarted = results["none"], results["1"]
    assert whole["steps"] == STEPS and whole["begun"] is None
    # Behind the last checkpoint, of step 4, or, where step 4's was not complete yet, of step 2.
    assert restarted["begun"] in ("step-2", "step-4")
    assert restarted["steps"] == STEPS - int(restarted["begun"].removeprefix("step-"))
    assert restarted["losses"] == whole["losses"] and len(whole["losses"]) == STEPS
    assert whole["losses"][-1] < whole["losses"][0]
