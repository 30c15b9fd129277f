"""The headline times of two builds beside each other, in one run on one GPU:

    python benchmarks/before_after.py OLD NEW --out FILE

OLD and NEW are folders that hold an importable ``flash_xlstm``. Each is measured twice, in turn, in a process of its
own. The difference between two runs of one build is noise. A row has the times of both.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

TOKENS, HEADS, DQK, DV = 65_536, 8, 256, 512  # the mLSTM's
SLSTM = ((4, 256), (12, 64))  # heads x dim, 16 rows of 1,024 tokens
STEP_BATCHES, DECODE_BATCHES, NEW_TOKENS = (1, 8, 64, 256), (1, 16, 64), 128


def _median_ms(call: Callable[[], object], calls: int = 30) -> float:
    for _ in range(5):
        call()
    events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(calls)]
    for start, stop in events:
        start.record()
        call()
        stop.record()
    torch.cuda.synchronize()
    return statistics.median(start.elapsed_time(stop) for start, stop in events)


def _mlstm(ops, seq: int) -> dict[str, float]:
    new = lambda *last: torch.randn(TOKENS // seq, seq, HEADS, *last, device="cuda")  # noqa: E731
    inputs = [*(new(d).bfloat16() for d in (DQK, DQK, DV)), new(), new() + 3]
    inputs = [t.requires_grad_() for t in inputs]
    dh = torch.randn_like(inputs[2])
    with torch.no_grad():
        times = {f"mlstm forward, S = {seq}, ms": _median_ms(lambda: ops.mlstm(*inputs))}
    both = lambda: torch.autograd.grad(ops.mlstm(*inputs), inputs, dh)  # noqa: E731
    return {**times, f"mlstm forward and backward, S = {seq}, ms": _median_ms(both)}


@torch.no_grad()
def _step(ops, batch: int) -> dict[str, float]:
    from graphs import capture

    new = lambda *shape: torch.randn(batch, HEADS, *shape, device="cuda")  # noqa: E731
    inputs = [*(new(d).bfloat16() for d in (DQK, DQK, DV)), new(), new()]
    states = [(new(DQK, DV), new(DQK), new()) for _ in range(max(2, min(16, 64 // batch)))]  # larger than the L2 cache
    calls = 64

    def chain() -> None:
        for call in range(calls):
            ops.mlstm_step(*inputs, states[call % len(states)], settled_state=True)

    return {f"step, batch {batch}, us": _median_ms(capture(chain).replay, 15) / calls * 1e3}


def _slstm(ops, heads: int, dim: int) -> dict[str, float]:
    new = lambda *shape: torch.randn(*shape, device="cuda", dtype=torch.bfloat16)  # noqa: E731
    inputs = [new(16, 1024, 4, heads, dim), new(4, heads, dim, dim) * dim**-0.5, new(4, heads, dim)]
    inputs = [t.requires_grad_() for t in inputs]
    dh = new(16, 1024, heads, dim)
    with torch.no_grad():
        times = {f"slstm forward, {heads} x {dim}, ms": _median_ms(lambda: ops.slstm(*inputs), 10)}
    both = lambda: torch.autograd.grad(ops.slstm(*inputs), inputs, dh)  # noqa: E731
    return {**times, f"slstm forward and backward, {heads} x {dim}, ms": _median_ms(both, 10)}


def _decode(weight_mode: str, batches: tuple[int, ...]) -> dict[str, float]:
    """The time of a token of the 7B model in `generate`: the difference of two lengths."""
    from flash_xlstm.models import xLSTMConfig, xLSTMForCausalLM

    torch.set_default_dtype(torch.bfloat16)
    with torch.device("cuda"):
        model = xLSTMForCausalLM(xLSTMConfig(weight_mode=weight_mode)).eval()
    torch.set_default_dtype(torch.float32)
    times = {}
    for batch in batches:
        ids = torch.randint(3, 200, (batch, 64), device="cuda")

        def seconds(tokens: int, ids: torch.Tensor = ids) -> float:
            torch.cuda.synchronize()
            begin = time.perf_counter()
            options = {"do_sample": False, "eos_token_id": None, "pad_token_id": 1}
            model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=tokens, **options)
            torch.cuda.synchronize()
            return time.perf_counter() - begin

        seconds(16), seconds(16)
        short, long = (min(seconds(tokens) for _ in range(3)) for tokens in (16, 16 + NEW_TOKENS))
        times[f"decode, {weight_mode} weights, batch {batch}, ms a token"] = (long - short) / NEW_TOKENS * 1e3
        before = torch.cuda.memory_allocated()
        model.release_graphs()
        times[f"decode, {weight_mode} weights, batch {batch}, MiB kept"] = (
            before - torch.cuda.memory_allocated()
        ) / 2**20
    return times


def _worker(path: str) -> None:
    import flash_xlstm
    from flash_xlstm import ops

    torch.manual_seed(0)
    times: dict[str, float] = {}
    for seq in (512, 2048, 65_536):
        times |= _mlstm(ops, seq)
    for batch in STEP_BATCHES:
        times |= _step(ops, batch)
    for heads, dim in SLSTM:
        times |= _slstm(ops, heads, dim)
    torch.cuda.empty_cache()
    times |= _decode("single", DECODE_BATCHES)
    torch.cuda.empty_cache()
    times |= _decode("fused", DECODE_BATCHES[-1:])
    Path(path).write_text(json.dumps({"build": flash_xlstm.build_info(), "times": times}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("old", type=Path)
    parser.add_argument("new", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    found: dict[str, list[dict]] = {"old": [], "new": []}
    with tempfile.TemporaryDirectory() as folder:
        for turn in range(2):
            for name, site in (("old", args.old), ("new", args.new)):
                path = os.path.join(folder, f"{name}{turn}.json")
                sites = [str(site.resolve()), os.environ.get("PYTHONPATH", "")]
                environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sites))}
                subprocess.run([sys.executable, __file__, "--worker", path], env=environment, check=True)
                found[name].append(json.loads(Path(path).read_text()))
    rows = [
        {"what": what, **{name: [run["times"][what] for run in runs] for name, runs in found.items()}}
        for what in found["new"][0]["times"]
    ]
    facts = {"gpu": torch.cuda.get_device_name(), "torch": torch.__version__, "date": time.strftime("%Y-%m-%d")}
    builds = {name: runs[0]["build"] for name, runs in found.items()}
    args.out.write_text(json.dumps({"environment": facts, "builds": builds, "results": rows}, indent=1) + "\n")
    for row in rows:
        old, new = (" ".join(f"{x:9.4g}" for x in row[name]) for name in ("old", "new"))
        print(f"{row['what']:55s} old {old}  new {new}")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--worker"]:
        _worker(sys.argv[2])
    else:
        main()
