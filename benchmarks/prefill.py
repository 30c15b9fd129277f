"""Subject prefill: time and peak memory of reading a prompt. Ours computes the last token's logits only.

`floor_ms` is the time of two operations a parameter and token, without the embedding table, at the rate of a large
product in the same run. `state_mib` is the size of the state after the prompt. `transformer_mib` is computed: keys and
values of all heads in bfloat16, for a Transformer of the same width and depth.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator

import torch

import language_models
from run import describe, device_rates, free_memory, median_time_ms, pair, peak_memory_bytes

SHAPES = ((1, 2048), (1, 8192), (8, 2048), (1, 32768), (1, 131072))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    language_models.add_arguments(parser)
    default = SHAPES if torch.cuda.is_available() else ((1, 512),)
    parser.add_argument("--shapes", nargs="+", type=pair, default=default, help="batch x seq, as 1x8192")
    parser.add_argument("--longest-peer", type=int, default=8192, help="peers read no longer prompts")
    parser.add_argument("--seconds-each", type=float, default=2.0)


def _measure(row: dict, model, rates: dict, args: argparse.Namespace) -> None:
    device = torch.device(args.device)
    batch, seq = row["batch"], row["seq"]
    ids = torch.randint(3, 200, (batch, seq), device=device)
    state = model.prefill(ids)
    layers = state if isinstance(state, dict) else state.rnn_state
    row["state_mib"] = sum(t.numel() * t.element_size() for layer in layers.values() for t in layer) / 2**20
    _, width, blocks, _ = language_models.SIZES[args.size]
    row["transformer_mib"] = 2 * 2 * width * blocks * batch * seq / 2**20
    del state, layers
    if device.type == "cuda":
        row["peak_memory_mib"] = peak_memory_bytes(lambda: model.prefill(ids)) / 2**20
    row["time_ms"] = median_time_ms(lambda: model.prefill(ids), device, budget_s=args.seconds_each)
    parameters = language_models.weight_bytes(model) / getattr(torch, args.dtype).itemsize
    row["floor_ms"] = 2 * parameters * batch * seq / rates["matmul_tflops"] / 1e9


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
        for batch, seq in args.shapes:
            if name != "flash_xlstm" and seq > args.longest_peer:
                continue
            row = {"what": "prefill", "model": name, "batch": batch, "seq": seq, "size": args.size, "dtype": args.dtype}
            try:
                _measure(row, model, rates, args)
            except Exception as error:
                row["error"] = describe(error)
            free_memory(device)
            yield row
        del model
        free_memory(device)
