"""A small run of the subject serving."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("vllm", reason="vLLM has an environment of its own: make test-vllm")

RUN = Path(__file__).parents[3] / "benchmarks" / "run.py"


def test_serving(tmp_path):
    out = tmp_path / "results.json"
    options = "--size tiny --concurrency 1 3 --prompt 8 --new-tokens 4 --host-steps 4 --eager".split()
    done = subprocess.run([sys.executable, RUN, "serving", *options, "--out", out], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    rows = json.loads(out.read_text())["results"]
    serving = [(row["engine"], row["concurrency"]) for row in rows if row["what"] == "serving"]
    assert serving == [("generate", 1), ("generate", 3), ("vllm", 1), ("vllm", 3)]
    assert all(row["tokens_per_s"] > 0 for row in rows if row["what"] == "serving")
    assert {row["model"]: row["host_ms"] > 0 for row in rows if row["what"] == "host"} == {
        "flash_xlstm": True,
        "mamba2": True,
    }
