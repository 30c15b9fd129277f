"""``flash-xlstm tasks``: xLSTM[1:0], [0:1] and [1:1] on state tracking and recall (arXiv 2405.04517, section 4.1)."""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from flash_xlstm.cli.info import environment
from flash_xlstm.training import checkpoint
from flash_xlstm.training.device import choose_device
from flash_xlstm.training.tasks.recipes import FULL, MODELS, SMALL, Recipe
from flash_xlstm.training.tasks.results import measure, plot, table, title_of

_TEST_SHARE = 0.2  # the part of a model's share of --seconds that is reserved for its test


def run(args: argparse.Namespace) -> int:
    """Trains and tests what the command line asks for."""
    device = choose_device(args.device)
    threads = args.threads or (1 if args.small else None)  # more threads do not speed up models this small
    if threads is not None:
        torch.set_num_threads(threads)
    recipes = SMALL if args.small else FULL
    names = args.tasks or (["parity"] if args.small else list(recipes))
    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    document: dict[str, Any] = {"subject": "tasks", "environment": _environment(device), "results": []}
    began = time.monotonic()
    pairs = [(name, model) for name in names for model in args.models or MODELS]
    for index, (name, model) in enumerate(pairs):
        left = (args.seconds or math.inf) - (time.monotonic() - began)
        share = (1 - _TEST_SHARE) * max(left, 1e-3) / (len(pairs) - index)  # unused time of earlier models is shared
        document["results"].append(_measure(name, recipes[name], model, device, args, share))
        document["seconds"] = time.monotonic() - began
        _write(out, document)
    print(table(document["results"]))
    print(f"{document['seconds']:.0f} s in all; results: {out / 'tasks.json'}, tasks.txt and tasks.png")
    return 0


def _measure(
    name: str, recipe: Recipe, kind: str, device: torch.device, args: argparse.Namespace, seconds: float
) -> dict[str, Any]:
    """One row of the results, with a bar on stderr; `seconds` is what training may take."""
    with tqdm(
        total=args.steps or recipe.steps,
        unit="step",
        desc=title_of(name, kind),
        dynamic_ncols=True,
        mininterval=0.1 if sys.stderr.isatty() else 10.0,
    ) as bar:

        def stepped(loss: float | None) -> None:
            if loss is not None:
                bar.set_postfix_str(f"loss {loss:.4f}", refresh=False)
            bar.update()

        return measure(
            name,
            recipe,
            kind,
            device,
            steps=args.steps,
            seconds=seconds,
            seed=args.seed,
            dtype=args.dtype,
            cuda_graphs=not args.eager,
            stepped=stepped,
        )


def _environment(device: torch.device) -> dict[str, Any]:
    facts = {**environment(), "device": str(device)}
    if device.type == "cuda":
        facts["gpu"] = torch.cuda.get_device_name(device)
    return facts


def _write(out: Path, document: dict[str, Any]) -> None:
    checkpoint.write_file(out / "tasks.json", (json.dumps(document, indent=1) + "\n").encode())
    checkpoint.write_file(out / "tasks.txt", (table(document["results"]) + "\n").encode())
    checkpoint.write_file(out / "tasks.png", plot(document["results"]))
