"""``flash-xlstm bench``: the tables and plots of the docs, of this machine.

What is measured, drawn and compared lies in the repository's folder benchmarks, which wheels hold as
``flash_xlstm/benchmarks``. Each subject runs in a process of its own: packages of peers slow Python down, and an error
on a GPU can leave a process without it.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, TextIO

from tqdm import tqdm

import flash_xlstm
from flash_xlstm.cli.errors import CommandError
from flash_xlstm.training.device import choose_device

# Subjects and their options, by device.
FULL = {
    "cuda": {
        "mlstm": f"--workers {min(16, os.cpu_count() or 1)}",
        "slstm": "--workers 2",
        "step": "", "pointwise": "", "linear_rows": "", "loss": "", "decode": "", "prefill": "",
        "train": "--cases eager compiled --steps 8 --profile",
    },
    "cpu": {
        "cpu": "--seconds 3",
        "cpu_vs_transformers": "--seconds 5", "dropin": "", "step": "--batches 1 16", "pointwise": "--rows 1024",
        "decode": "--new-tokens 64 --size 101m",
    },
}  # fmt: skip
_MODEL = "--size 134m --models flash_xlstm transformers --seconds-each 0.3"
QUICK = {
    "cuda": {
        "mlstm": "--shapes 32x2048 8x8192 --peers flash_xlstm cudnn_attention --seconds 15 --seconds-each 0.1",
        "slstm": "--peers flash_xlstm --seconds-each 0.1",
        "step": "--batches 1 64 --seconds-each 0.1",
        "decode": f"{_MODEL} --batches 1 16 --new-tokens 16",
    },
    "cpu": {
        "cpu": "--slstm 16x64x4x64 --mlstm 1x1024x4x64x128 --dtypes float32 --threads 1 --seconds 0.2 --no-model",
        "step": "--batches 1 --peers flash_xlstm --seconds-each 0.2",
        "decode": "--size tiny --models flash_xlstm transformers --dtype float32 --new-tokens 4 --seconds-each 0.3",
    },
}


def run(args: argparse.Namespace) -> int:
    """Measures, or compares, or both.

    Returns:
        0; 1 if --tolerance was given and something is slower than in the results compared with.

    Raises:
        CommandError: a subject is unknown or failed, or results cannot be read.
    """
    if args.tolerance is not None and args.compare is None:
        raise CommandError("--tolerance needs --compare: it says how much slower than OLD is too slow")
    if args.compare is not None and len(args.compare) > 2:
        raise CommandError(f"--compare takes OLD or OLD NEW, not {len(args.compare)} of them")
    if args.compare is not None and len(args.compare) == 2:
        if args.subjects or args.quick:
            raise CommandError("--compare OLD NEW compares two results; with subjects or --quick give OLD alone")
        old, new = map(_results, args.compare)
        return _compare(old, new, args.tolerance)
    out = Path(args.out)
    # Read first: OLD may be OUT.
    kept = None if args.compare is None else _results(args.compare[0])
    device = choose_device(args.device)
    plan = (QUICK if args.quick else FULL)[device.type]
    wanted = args.subjects or list(plan)
    known = _module("run").SUBJECTS
    for subject in wanted:
        if subject not in known:
            raise CommandError(f"unknown subject {subject}; there are {', '.join(known)}")
        if args.quick and subject not in plan:
            raise CommandError(f"--quick has no {subject} on this device; it has {', '.join(plan)}")
    out.mkdir(parents=True, exist_ok=True)
    began = time.monotonic()
    files: list[Path] = []
    failed: list[Path] = []
    environment = dict(os.environ)
    if device.type == "cpu":
        environment["CUDA_VISIBLE_DEVICES"] = ""
    elif device.index is not None:
        environment["CUDA_VISIBLE_DEVICES"] = str(device.index)
    with tqdm(wanted, unit="subject", dynamic_ncols=True, mininterval=0.1) as bar:
        for subject in bar:
            bar.set_description(subject)
            file = out / f"{subject}.json"
            command = [*_script("run"), subject, *plan.get(subject, "").split(), "--out", str(file)]
            with open(out / f"{subject}.log", "w") as log:
                code = _measure(command, environment, log, bar)
            (failed if code else files).append(file)
    if files:
        _report(out, files, environment)
    print(f"{time.monotonic() - began:.0f} s in all; tables: {out / 'report.md'}; rows and pictures beside them")
    if failed:
        raise CommandError("; ".join(f"{file.stem} failed: {_last_line(file.with_suffix('.log'))}" for file in failed))
    if kept is None:
        return 0
    # OUT may hold results of other runs, too.
    return _compare(kept, {name: found for file in files for name, found in _results(file).items()}, args.tolerance)


def _folder() -> Path:
    """The benchmarks' folder: in the package that a wheel installed, or beside it in a clone."""
    package = Path(flash_xlstm.__file__).parent
    for place in (package / "benchmarks", package.parents[1] / "benchmarks"):
        if (place / "run.py").exists():
            return place
    raise CommandError(f"no benchmarks beside {package}; install the package from a wheel, or run in a clone")


def _script(name: str) -> list[str]:
    return [sys.executable, str(_folder() / f"{name}.py")]


def _module(name: str) -> Any:
    spec = importlib.util.spec_from_file_location(f"flash_xlstm_benchmarks_{name}", _folder() / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _measure(command: list[str], environment: dict[str, str], log: TextIO, bar: Any) -> int:
    """Runs a subject and returns its exit code. Its output goes to the log; the bar shows its last line."""
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, text=True, env=environment) as process:
        assert process.stdout is not None
        try:
            for line in process.stdout:
                log.write(line)
                log.flush()
                bar.set_postfix_str(" ".join(line.split())[:60])
        except BaseException:
            process.terminate()
            raise
    return process.returncode


def _report(out: Path, files: list[Path], environment: dict[str, str]) -> None:
    names = [str(file) for file in files]
    made = subprocess.run([*_script("report"), *names], capture_output=True, text=True, env=environment)
    if made.returncode:
        raise CommandError(f"the tables failed: {made.stderr.strip().splitlines()[-1]}")
    (out / "report.md").write_text(made.stdout)
    print(made.stdout)
    drawn = subprocess.run([*_script("plot"), *names], capture_output=True, text=True, env=environment)
    if drawn.returncode:
        raise CommandError(f"the pictures failed: {drawn.stderr.strip().splitlines()[-1]}")


def _results(path: str | Path) -> dict[str, dict]:
    try:
        return _module("compare").documents(Path(path))
    except (OSError, ValueError) as error:
        raise CommandError(f"--compare: {error}") from error


def _compare(old: dict[str, dict], new: dict[str, dict], tolerance: float | None) -> int:
    try:
        return _module("compare").tell(old, new, tolerance)
    except ValueError as error:
        raise CommandError(f"--compare: {error}") from error


def _last_line(log: Path) -> str:
    lines = log.read_text().strip().splitlines()
    return f"{lines[-1] if lines else 'it ended without a word'} ({log})"
