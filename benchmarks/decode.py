"""Subject decode: one token of a whole model, eagerly and in a CUDA graph, and `generate` from end to end.

`floor_ms` is the time to read the weights once and to read and write the states at the copy bandwidth of the same run.
`generate` is the time of the whole call, prompt included, divided by the new tokens. On a CPU the models take turns, so
that other load on the machine affects all of them.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import time
from collections.abc import Iterator

import torch

import language_models
from flash_xlstm.nn.linear import weights_at_rest
from graphs import capture
from run import alternating_times_ms, describe, device_rates, free_memory, median_time_ms


def add_arguments(parser: argparse.ArgumentParser) -> None:
    language_models.add_arguments(parser)
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 16, 64] if torch.cuda.is_available() else [1])
    parser.add_argument("--prompt", type=int, default=64)
    parser.add_argument("--new-tokens", type=int, default=256)
    parser.add_argument("--seconds-each", type=float, default=2.0)


def _state_tensors(state: object) -> list[torch.Tensor]:
    layers = state if isinstance(state, dict) else state.rnn_state  # type: ignore[attr-defined]
    return [t for layer in layers.values() for t in layer]


def _prepare(name: str, model, batch: int, rates: dict, args: argparse.Namespace):
    """A step of a model, and the common entries of its rows."""
    ids = torch.randint(3, 200, (batch, args.prompt), device=args.device)
    state = model.prefill(ids)
    token = ids[:, :1].clone()
    states = sum(t.numel() * t.element_size() for t in _state_tensors(state))
    floor_ms = (language_models.weight_bytes(model) + 2 * states) / rates["copy_gb_per_s"] / 1e6
    common = {"what": "decode", "model": name, "batch": batch, "size": args.size, "dtype": args.dtype}
    return lambda: model.step(token, state), {**common, "mode": "eager", "floor_ms": floor_ms}


def _steps(models: dict, batch: int, rates: dict, args: argparse.Namespace) -> Iterator[dict]:
    device = torch.device(args.device)
    prepared = [_prepare(name, model, batch, rates, args) for name, model in models.items()]
    if device.type == "cpu":
        times = alternating_times_ms([step for step, _ in prepared], budget_s=args.seconds_each)
        yield from ({**row, "time_ms": time_ms} for (_, row), time_ms in zip(prepared, times, strict=True))
        return
    for step, row in prepared:
        yield {**row, "time_ms": median_time_ms(step, device, budget_s=args.seconds_each)}
        row = {**row, "mode": "graph"}
        try:
            with weights_at_rest():  # as generate captures its steps
                graph = capture(step)
            row["time_ms"] = median_time_ms(graph.replay, device, budget_s=args.seconds_each)
        except Exception as error:
            del row["floor_ms"]
            row["error"] = describe(error)
        yield row


def _generate(models: dict, batch: int, args: argparse.Namespace) -> Iterator[dict]:
    ids = torch.randint(3, 200, (batch, args.prompt), device=args.device)
    options = {"max_new_tokens": args.new_tokens, "do_sample": False, "eos_token_id": None, "pad_token_id": 1}
    times: dict[str, list[float]] = {name: [] for name in models if hasattr(models[name].module, "generation_config")}
    for repeat in range(6):
        for name, taken in times.items():
            begin = time.perf_counter()
            made = models[name].module.generate(ids, attention_mask=torch.ones_like(ids), **options)
            made.cpu()
            if repeat:  # the first call captures
                taken.append((time.perf_counter() - begin) * 1e3)
    for name, taken in times.items():
        total = statistics.median(taken)
        row = {"what": "decode", "model": name, "batch": batch, "size": args.size, "dtype": args.dtype}
        row |= {"mode": "generate", "time_ms": total / args.new_tokens, "total_ms": total}
        yield {**row, "new_tokens": args.new_tokens}


def _groups(args: argparse.Namespace) -> Iterator[dict | list[dict]]:
    """Models to measure together, by name: one at a time on a GPU, all in turn on a CPU. A list has the rows of absent
    models."""
    together: dict = {}
    for name in args.models:
        try:
            together[name] = language_models.load(name, args)
        except Exception as error:
            yield [{"what": "absent", "model": name, "error": describe(error)}]
            continue
        if args.device != "cpu":
            yield dict([together.popitem()])
    if together:
        yield together


@torch.no_grad()
def run(args: argparse.Namespace) -> Iterator[dict]:
    device = torch.device(args.device)
    rates = device_rates(device)
    yield {"what": "rates", **rates}
    for group in _groups(args):
        if isinstance(group, list):
            yield from group
            continue
        for batch, part in itertools.product(args.batches, ("steps", "generate")):
            try:
                yield from _steps(group, batch, rates, args) if part == "steps" else _generate(group, batch, args)
            except Exception as error:
                names = " ".join(group)
                yield {"what": "decode", "model": names, "batch": batch, "mode": part, "error": describe(error)}
            free_memory(device)
        group.clear()
        free_memory(device)


def summarize(rows: list[dict]) -> list[dict]:
    """A line for each mode and batch: every model's time a token, and each divided by ours."""
    found: dict[tuple, dict[str, float]] = {}
    for row in rows:
        if row["what"] == "decode" and "time_ms" in row:
            key = (row["mode"], row["batch"], row["size"], row["dtype"])
            found.setdefault(key, {})[row["model"]] = row["time_ms"]
    lines = []
    for key, times in found.items():
        line: dict = dict(zip(("mode", "batch", "size", "dtype"), key, strict=True))
        line |= {f"{name}_ms": time_ms for name, time_ms in times.items()}
        ours = times.get("flash_xlstm")
        line |= {f"vs_{name}": time_ms / ours for name, time_ms in times.items() if ours and name != "flash_xlstm"}
        lines.append(line)
    return lines
