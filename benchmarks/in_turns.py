"""Two builds in turns, in one run on one GPU: the settings of `mlstm --settings grid`, or training steps:

    python benchmarks/in_turns.py OLD NEW --out FILE
    python benchmarks/in_turns.py OLD NEW --out FILE --subject train --cases eager compiled

OLD and NEW are folders that hold an importable ``flash_xlstm``. Each works in a process of its own, on inputs of one
seed. For each row the old, the new, the new and the old build measure one after the other, `--rounds` times, so that a
GPU that grows warm slows both. A row has the times of the turns of each, in ms: medians of a turn's calls, or of a
case's steps. `ratio` is the new build's median over the old one's. Cases are those of the subject train.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import mlstm
import train
from peers import DTYPES, Point, tensors
from run import describe, free_memory, median_time_ms, timed_call

Turn = dict[str, Any]  # {"ms": [...]}, and what else is known; or {"error": ...}


def _mlstm(pass_name: str, *sizes: int, device: torch.device, milliseconds: float) -> Turn:
    from flash_xlstm import ops

    inputs = tensors("flash_xlstm", Point(*sizes), DTYPES["bfloat16"], device)
    function = timed_call(ops.mlstm, inputs, pass_name != "forward")
    return {"ms": [median_time_ms(function, device, budget_s=milliseconds / 1e3)]}


_steps: dict[str, Callable[[], object]] = {}  # of the cases of this process, which keep their models


def _train(name: str, size: str | None, steps: int, device: torch.device) -> Turn:
    peak = {}
    if name not in _steps:
        case = train.CASES[name]
        prepared = train.prepare(case, size or case.size, device)
        if case.checkpointed:
            prepared.module.gradient_checkpointing_enable()
        (vocabulary, *_), shape = train.SIZES[size or case.size]
        torch.manual_seed(1)
        ids = torch.randint(3, vocabulary, shape, device=device)
        forward: Callable[..., Any] = prepared.module
        if case.compiled:
            forward = torch.compile(forward, fullgraph=True)

        def step() -> None:
            prepared.loss_of(forward, ids).backward()
            prepared.optimizer.step()
            prepared.optimizer.zero_grad(set_to_none=True)

        for _ in range(3):
            step()
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
            step()
            peak = {"peak_gib": torch.cuda.max_memory_allocated() / 2**30}
        _steps[name] = step
    _steps[name]()  # the GPU's clocks have settled on what the other process ran
    return {"ms": train._times_ms(_steps[name], device, steps), **peak}


def _work(args: argparse.Namespace) -> None:
    """Answers each line of the standard input, the arguments of a turn, with the turn."""
    from flash_xlstm import build_info

    device = torch.device(args.device)
    print(json.dumps(build_info()), flush=True)
    for line in sys.stdin:
        try:
            if args.subject == "mlstm":
                turn = _mlstm(*json.loads(line), device=device, milliseconds=args.milliseconds)
                free_memory(device)
            else:
                turn = _train(*json.loads(line), steps=args.steps, device=device)
        except Exception as error:
            turn = {"error": describe(error)}
        print(json.dumps(turn), flush=True)


def _start(site: Path) -> subprocess.Popen:
    sites = [str(site.resolve()), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sites))}
    command = [sys.executable, *sys.argv, "--worker"]
    return subprocess.Popen(command, env=environment, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE)


def _answer(worker: subprocess.Popen) -> Turn:
    assert worker.stdout is not None
    line = worker.stdout.readline()
    if not line:
        raise RuntimeError(f"a build's process ended with {worker.wait()}")
    return json.loads(line)


def _ask(worker: subprocess.Popen, *given: object) -> Turn:
    assert worker.stdin is not None
    print(json.dumps(given), file=worker.stdin, flush=True)
    return _answer(worker)


def _measured(row: dict, given: tuple, workers: dict[str, subprocess.Popen], rounds: int) -> dict:
    times: dict[str, list[float]] = {"old": [], "new": []}
    for name in ("old", "new", "new", "old") * rounds:
        turn = _ask(workers[name], *given)
        if "error" in turn:
            return {**row, "error": f"{name}: {turn['error']}"}
        times[name] += turn.pop("ms")
        row |= {f"{name}_{what}": value for what, value in turn.items()}
    row |= {f"{name}_ms": taken for name, taken in times.items()}
    return {**row, "ratio": statistics.median(times["new"]) / statistics.median(times["old"])}


def summarize(rows: list[dict]) -> list[dict]:
    summary = []
    for what in dict.fromkeys(row.get("pass", row.get("case")) for row in rows):
        found = [row for row in rows if what in (row.get("pass"), row.get("case")) and "ratio" in row]
        ratios = sorted(row["ratio"] for row in found)
        if not ratios:
            continue
        line = {"of": what, "settings": len(ratios), "least": ratios[0], "median": statistics.median(ratios)}
        line |= {"largest": ratios[-1], "above_1.03": sum(ratio > 1.03 for ratio in ratios)}
        if len(found) == 1:
            line |= {f"{name}_ms": statistics.median(found[0][f"{name}_ms"]) for name in ("old", "new")}
        summary.append(line)
    return summary


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("old", type=Path)
    parser.add_argument("new", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--subject", choices=("mlstm", "train"), default="mlstm")
    parser.add_argument("--settings", choices=("headline", "grid", "small"), default="grid", help="of mlstm")
    parser.add_argument("--milliseconds", type=float, default=12.0, help="of a turn of mlstm; five calls at least")
    parser.add_argument("--cases", nargs="+", choices=train.CASES, default=["eager", "compiled"], metavar="CASE")
    parser.add_argument("--size", choices=train.SIZES, help="of train, instead of each case's own")
    parser.add_argument("--steps", type=int, default=3, help="of a turn of train")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        return _work(args)
    workers = {"old": _start(args.old), "new": _start(args.new)}
    builds = {name: _answer(worker) for name, worker in workers.items()}
    device = torch.device(args.device)
    gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else None
    facts = {"gpu": gpu, "torch": torch.__version__, "date": time.strftime("%Y-%m-%d")}
    if args.subject == "mlstm":
        points = mlstm.points(argparse.Namespace(settings=args.settings, shapes=None, heads=None, dims=None))
        tasks = [
            ({"what": "mlstm", "pass": name, **vars(point), "dtype": "bfloat16"}, (name, *vars(point).values()))
            for point in points
            for name in mlstm.PASSES
        ]
    else:
        tasks = [({"what": "train", "case": name}, (name, args.size)) for name in args.cases]
    rows: list[dict] = []
    for row, given in tasks:
        rows.append(_measured(row, given, workers, args.rounds))
        found = {"environment": facts, "builds": builds, "results": rows, "summary": summarize(rows)}
        args.out.write_text(json.dumps(found, indent=2) + "\n")
        print(rows[-1], flush=True)
    for worker in workers.values():
        worker.communicate()
    for line in summarize(rows):
        print(line)


if __name__ == "__main__":
    main()
