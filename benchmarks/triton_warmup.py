"""Compiles the Triton kernels of peers into Triton's cache, in concurrent processes, without launching any.

mlstm_kernels compiles every kernel again for each batch, seq, heads, dqk and dv. simple_gla tries 48 configurations of
one kernel for each dqk and dv. Mamba-2 tries about ten of each of its kernels, once for all settings. In sequence that
takes minutes.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import time
from pathlib import Path

import torch

from processes import outputs

# Triton's default; Inductor would move the cache at its first compilation, and hide what was compiled before
os.environ.setdefault("TRITON_CACHE_DIR", str(Path.home() / ".triton" / "cache"))


def _compile_only(part: int, parts: int, most: int) -> None:
    """Turns every launch into a compilation. Every autotuner of at most `most` configurations compiles its share."""
    from triton.runtime import jit
    from triton.runtime.autotuner import Autotuner

    launch = getattr(jit.JITFunction.run, "launch", jit.JITFunction.run)

    def compile_kernel(self, *args, grid, warmup, **kwargs):
        return launch(self, *args, grid=grid, warmup=True, **kwargs)

    def compile_configs(self, *args, **kwargs):
        self.nargs = dict(zip(self.arg_names, args, strict=False))
        for config in self.configs[part::parts] if len(self.configs) <= most else []:
            with contextlib.suppress(Exception):
                self.fn.run(*args, **{**kwargs, **config.all_kwargs()})
        self.best_config = self.configs[0]  # Mamba-2's backward asks for it

    properties = torch.cuda.get_device_properties
    torch.cuda.get_device_properties = lambda device=None: properties()  # Mamba-2 asks for those of its tensors' device
    compile_kernel.launch = launch
    jit.JITFunction.run = compile_kernel
    for tuner in (Autotuner, *Autotuner.__subclasses__()):
        tuner.run = compile_configs


def compile_task(task: dict) -> None:
    """A peer's forward and, if asked, backward on tensors without data."""
    from peers import DTYPES, PEERS, Point, tensors

    call = PEERS[task["peer"]].load()
    _compile_only(task["part"], task["parts"], task["most"])
    for numbers in task["points"]:
        leaves = tensors(task["peer"], Point(*numbers), DTYPES[task["dtype"]], "meta")
        leaves = [t.requires_grad_(task["backward"]) for t in leaves]
        h = call(*leaves)
        if task["backward"]:
            with contextlib.suppress(RuntimeError):  # the measurement reports a refused backward
                torch.autograd.grad(h, leaves, torch.empty_like(h), allow_unused=True)


def tasks(peer: str, points: list[tuple], backward: bool, dtype: str) -> list[dict]:
    """The compilations for points (batch, seq, heads, dqk, dv), in the order of the measurement."""
    common = {"peer": peer, "dtype": dtype, "part": 0, "parts": 1, "most": 1000, "backward": backward}
    if peer == "mamba2":
        return [{**common, "points": points[:1], "part": x, "parts": 4} for x in range(4)]
    if peer != "simple_gla":
        return [{**common, "points": [point]} for point in points]
    # kernels are compiled for heads, dqk and dv; that with 48 configurations is tuned at the first heads only
    found: list[dict] = []
    tuned, compiled = set(), set()
    for point in points:
        heads, dims = point[2], point[3:]
        gla = {**common, "points": [point], "backward": False}
        if dims not in tuned:
            found += [{**gla, "part": x, "parts": 4} for x in range(4)]
        elif (heads, dims) not in compiled:
            found.append({**gla, "most": 8})
        tuned.add(dims)
        compiled.add((heads, dims))
    return found


def warm(wanted: list[dict], workers: int, seconds: float) -> dict:
    """Runs the tasks in up to `workers` processes, for at most `seconds`. Reports how many succeeded."""
    begin = time.perf_counter()
    shares = [wanted[x::workers] for x in range(workers) if wanted[x::workers]]
    environment = {**os.environ, "TORCHDYNAMO_DISABLE": "1", "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    script = [sys.executable, str(Path(__file__).resolve())]
    done, messages = 0, set()
    for output, in_time in outputs([[*script, json.dumps(share)] for share in shares], seconds, environment):
        if not in_time:
            messages.add("out of time")
        done += output.count("compiled\n")
        messages |= {line for line in output.splitlines() if line.startswith("failed")}
    report = {"what": "triton_warmup", "tasks": len(wanted), "done": done, "seconds": time.perf_counter() - begin}
    if messages:
        report["error"] = "; ".join(sorted(messages))[:500]
    return report


def main() -> None:
    sys.path.insert(0, str(Path(__file__).parent))
    for task in json.loads(sys.argv[1]):
        try:
            compile_task(task)
            print("compiled", flush=True)
        except Exception as error:
            print(f"failed {task['peer']}: {type(error).__name__}: {error}"[:200].replace("\n", " "), flush=True)


if __name__ == "__main__":
    main()
