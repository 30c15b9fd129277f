"""Subject decode: one token of a whole model, eagerly and in a CUDA graph, and `generate` from end to end.

`floor_ms` is the time to read the weights once and to read and write the states at the copy bandwidth of the same run.
`generate` is the whole call, prompt included, over its new tokens.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import time
from collections.abc import Iterator

import torch

import language_models
from graphs import capture
from run import describe, device_rates, free_memory, median_time_ms


def add_arguments(parser: argparse.ArgumentParser) -> None:
    language_models.add_arguments(parser)
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 16, 64] if torch.cuda.is_available() else [1])
    parser.add_argument("--prompt", type=int, default=64)
    parser.add_argument("--new-tokens", type=int, default=256)
    parser.add_argument("--seconds-each", type=float, default=2.0)


def _state_tensors(state: object) -> list[torch.Tensor]:
    layers = state if isinstance(state, dict) else state.rnn_state  # type: ignore[attr-defined]
    return [t for layer in layers.values() for t in layer]


def _steps(name: str, model, batch: int, rates: dict, args: argparse.Namespace) -> Iterator[dict]:
    device = torch.device(args.device)
    ids = torch.randint(3, 200, (batch, args.prompt), device=device)
    state = model.prefill(ids)
    token = ids[:, :1].clone()
    states = sum(t.numel() * t.element_size() for t in _state_tensors(state))
    floor_ms = (language_models.weight_bytes(model) + 2 * states) / rates["copy_gb_per_s"] / 1e6
    common = {"what": "decode", "model": name, "batch": batch, "size": args.size, "dtype": args.dtype}
    eager = median_time_ms(lambda: model.step(token, state), device, budget_s=args.seconds_each)
    yield {**common, "mode": "eager", "time_ms": eager, "floor_ms": floor_ms}
    if device.type == "cuda":
        row = {**common, "mode": "graph"}
        try:
            graph = capture(lambda: model.step(token, state))
            row["time_ms"] = median_time_ms(graph.replay, device, budget_s=args.seconds_each)
            row["floor_ms"] = floor_ms
        except Exception as error:
            row["error"] = describe(error)
        yield row


def _generate(name: str, model, batch: int, args: argparse.Namespace) -> dict:
    ids = torch.randint(3, 200, (batch, args.prompt), device=args.device)
    options = {"max_new_tokens": args.new_tokens, "do_sample": False, "eos_token_id": None, "pad_token_id": 1}
    times = []
    for repeat in range(4):
        begin = time.perf_counter()
        made = model.module.generate(ids, attention_mask=torch.ones_like(ids), **options)
        made.cpu()
        if repeat:  # the first captures
            times.append((time.perf_counter() - begin) * 1e3)
    row = {"what": "decode", "model": name, "batch": batch, "size": args.size, "dtype": args.dtype, "mode": "generate"}
    total = statistics.median(times)
    return {**row, "time_ms": total / args.new_tokens, "total_ms": total, "new_tokens": args.new_tokens}


@torch.no_grad()
def run(args: argparse.Namespace) -> Iterator[dict]:
    device = torch.device(args.device)
    rates = device_rates(device)
    yield {"what": "rates", **rates}
    for name in args.models:
        try:
            model = language_models.load(name, args)
        except Exception as error:
            yield {"what": "absent", "model": name, "error": describe(error)}
            continue
        for batch, part in itertools.product(args.batches, ("steps", "generate")):
            try:
                if part == "steps":
                    yield from _steps(name, model, batch, rates, args)
                elif hasattr(model.module, "generation_config"):
                    yield _generate(name, model, batch, args)
            except Exception as error:
                yield {"what": "decode", "model": name, "batch": batch, "mode": part, "error": describe(error)}
            free_memory(device)
        del model
        free_memory(device)
