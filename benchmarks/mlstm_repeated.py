"""Subject mlstm_repeated: subject mlstm in several processes, one after the other.

The autotuner of `chunk_simple_gla` chooses again in each process, so that one run says little about small heads. A row
is a peer's setting with its times in every process. Defaults: forward at 64 x 64, ours and simple_gla.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch

from mlstm import HEADS, KEY, PASSES
from peers import DTYPES, PEERS
from run import pair


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--runs", type=int, default=7, help="processes")
    parser.add_argument("--settings", choices=("headline", "grid", "small"), default="grid")
    parser.add_argument("--peers", nargs="+", choices=PEERS, default=["flash_xlstm", "simple_gla"])
    parser.add_argument("--heads", nargs="+", type=int, default=HEADS)
    parser.add_argument("--dims", nargs="+", type=pair, default=[(64, 64)], help="dqk x dv, as 64x64")
    parser.add_argument("--passes", nargs="+", choices=PASSES, default=["forward"])
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16")
    parser.add_argument("--seconds", type=float, default=200.0, help="for each process")
    parser.add_argument("--seconds-each", type=float, default=0.2, help="time for the calls of one measurement")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")


def command(args: argparse.Namespace, out: Path) -> list[str]:
    """The rows of one process."""
    words = [sys.executable, str(Path(__file__).with_name("run.py")), "mlstm", "--out", str(out)]
    words += ["--settings", args.settings, "--peers", *args.peers, "--passes", *args.passes, "--dtype", args.dtype]
    words += ["--heads", *map(str, args.heads), "--dims", *(f"{dqk}x{dv}" for dqk, dv in args.dims)]
    words += ["--seconds", str(args.seconds), "--seconds-each", str(args.seconds_each), "--device", args.device]
    return words


def merge(runs: list[list[dict]]) -> list[dict]:
    """A row for each peer and setting, with `times_ms` of all runs; None for a run without a time."""
    times: dict[tuple, list[float | None]] = {}
    for place, rows in enumerate(runs):
        for row in rows:
            if row["what"] == "mlstm":
                key = tuple(row[k] for k in KEY)
                times.setdefault(key, [None] * len(runs))[place] = row.get("time_ms")
    return [{"what": "mlstm_repeated", **dict(zip(KEY, key, strict=True)), "times_ms": t} for key, t in times.items()]


def run(args: argparse.Namespace) -> Iterator[dict]:
    runs = []
    with tempfile.TemporaryDirectory() as folder:
        for index in range(args.runs):
            out = Path(folder) / f"{index}.json"
            done = subprocess.run(command(args, out), capture_output=True, text=True)
            if done.returncode:
                lines = (done.stderr or done.stdout).strip().splitlines()
                yield {"what": "failed", "run": index, "error": lines[-1] if lines else f"exit {done.returncode}"}
            runs.append(json.loads(out.read_text())["results"] if out.exists() else [])
    yield from merge(runs)
