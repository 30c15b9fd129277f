"""The settings of `mlstm --settings grid` by two builds in turns, in one run on one GPU:

    python benchmarks/mlstm_in_turns.py OLD NEW --out FILE

OLD and NEW are folders that hold an importable ``flash_xlstm``. Each works in a process of its own. For each setting
and pass the old, the new, the new and the old build measure one after the other, so that a GPU that grows warm slows
both. A row has the median times of both turns of each, in ms. `ratio` is the new build's median over the old one's.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch

import mlstm
from peers import DTYPES, Point, tensors
from run import median_time_ms, timed_call


def _work(device: torch.device, milliseconds: float) -> None:
    """Answers each line of the standard input, a pass and a point, with a time or an error."""
    from flash_xlstm import build_info, ops

    print(json.dumps(build_info()), flush=True)
    for line in sys.stdin:
        pass_name, *sizes = json.loads(line)
        try:
            inputs = tensors("flash_xlstm", Point(*sizes), DTYPES["bfloat16"], device)
            function = timed_call(ops.mlstm, inputs, pass_name != "forward")
            answer: float | str = median_time_ms(function, device, budget_s=milliseconds / 1e3)
            del inputs, function
        except Exception as error:
            answer = f"{type(error).__name__}: {error}"[:300]
        if device.type == "cuda":
            torch.cuda.empty_cache()
        print(json.dumps(answer), flush=True)


def _start(site: Path, args: argparse.Namespace) -> subprocess.Popen:
    sites = [str(site.resolve()), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sites))}
    command = [sys.executable, __file__, "--worker", args.device, str(args.milliseconds)]
    return subprocess.Popen(command, env=environment, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE)


def _answer(worker: subprocess.Popen):
    assert worker.stdout is not None
    line = worker.stdout.readline()
    if not line:
        raise RuntimeError(f"a build's process ended with {worker.wait()}")
    return json.loads(line)


def _ask(worker: subprocess.Popen, pass_name: str, point: Point) -> float | str:
    assert worker.stdin is not None
    print(json.dumps([pass_name, *vars(point).values()]), file=worker.stdin, flush=True)
    return _answer(worker)


def summarize(rows: list[dict]) -> list[dict]:
    summary = []
    for pass_name in mlstm.PASSES:
        ratios = sorted(row["ratio"] for row in rows if row["pass"] == pass_name and "ratio" in row)
        if ratios:
            found = {"settings": len(ratios), "least": ratios[0], "median": statistics.median(ratios)}
            above = sum(ratio > 1.03 for ratio in ratios)
            summary.append({"pass": pass_name, **found, "largest": ratios[-1], "above_1.03": above})
    return summary


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("old", type=Path)
    parser.add_argument("new", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--settings", choices=("headline", "grid", "small"), default="grid")
    parser.add_argument("--milliseconds", type=float, default=12.0, help="time of a turn; five calls at least")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    points = mlstm.points(argparse.Namespace(settings=args.settings, shapes=None, heads=None, dims=None))
    workers = {"old": _start(args.old, args), "new": _start(args.new, args)}
    builds = {name: _answer(worker) for name, worker in workers.items()}
    device = torch.device(args.device)
    gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else None
    facts = {"gpu": gpu, "torch": torch.__version__, "date": time.strftime("%Y-%m-%d")}
    rows: list[dict] = []
    for point in points:
        for pass_name in mlstm.PASSES:
            times: dict[str, list] = {"old": [], "new": []}
            for name in ("old", "new", "new", "old"):
                times[name].append(_ask(workers[name], pass_name, point))
            row = {"what": "mlstm", "pass": pass_name, **vars(point), "dtype": "bfloat16"}
            rows.append({**row, **{f"{name}_ms": taken for name, taken in times.items()}})
            if all(isinstance(t, float) for taken in times.values() for t in taken):
                rows[-1]["ratio"] = statistics.median(times["new"]) / statistics.median(times["old"])
            found = {"environment": facts, "builds": builds, "results": rows, "summary": summarize(rows)}
            args.out.write_text(json.dumps(found, indent=2) + "\n")
            print(pass_name, *vars(point).values(), times, flush=True)
    for worker in workers.values():
        worker.communicate()
    for row in summarize(rows):
        print(row)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--worker"]:
        _work(torch.device(sys.argv[2]), float(sys.argv[3]))
    else:
        main()
