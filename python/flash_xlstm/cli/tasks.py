"""``flash-xlstm tasks``: what xLSTM[1:0], [0:1] and [1:1] can learn of state tracking and recall (arXiv 2405.04517,
section 4.1)."""

from __future__ import annotations

import argparse
import io
import json
import math
import time
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from flash_xlstm.cli.info import environment
from flash_xlstm.cli.task_data import TASKS
from flash_xlstm.cli.task_recipes import FULL, MODELS, SMALL, Recipe, build
from flash_xlstm.cli.task_training import accuracy, train
from flash_xlstm.training import checkpoint
from flash_xlstm.training.device import choose_device

_TEST_SHARE = 0.2  # of a model's share of --seconds, kept for testing it


def run(args: argparse.Namespace) -> int:
    """Trains and tests what the command line asks for."""
    device = choose_device(args.device)
    threads = args.threads or (1 if args.small else None)  # models this small gain nothing from more
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
        share = (1 - _TEST_SHARE) * max(left, 1e-3) / (len(pairs) - index)  # what others did not need is left to it
        document["results"].append(_measure(name, recipes[name], model, device, args, share))
        document["seconds"] = time.monotonic() - began
        _write(out, document)
    print(table(document["results"]))
    print(f"{document['seconds']:.0f} s in all; results: {out / 'tasks.json'}, tasks.txt and tasks.png")
    return 0


def _measure(
    name: str, recipe: Recipe, kind: str, device: torch.device, args: argparse.Namespace, seconds: float
) -> dict[str, Any]:
    """One row of the results; `seconds` is what training may take."""
    torch.manual_seed(args.seed)
    model = build(recipe, kind).to(device)
    dtype = getattr(torch, args.dtype)
    generator = torch.Generator(device).manual_seed(args.seed)
    began = time.monotonic()
    most = args.steps or recipe.steps
    title = f"{name} xLSTM[{kind}]"
    trained = train(model, recipe, most, generator, dtype, title, seconds=seconds, cuda_graphs=not args.eager)
    tested = time.monotonic()
    right = {length: accuracy(model, recipe, length, generator, dtype) for length in recipe.test_lengths}
    settings = {key: value for key, value in asdict(recipe).items() if key not in ("task", "test_lengths", "steps")}
    return {
        "task": name,
        "model": kind,
        "chance": recipe.task.chance,
        "unit": recipe.task.unit,
        "accuracy": right,
        "last_loss": trained.loss,
        "steps": trained.steps,
        "most_steps": most,
        "stopped": trained.stopped,
        "cuda_graphs": trained.cuda_graphs,
        "parameters": sum(p.numel() for p in model.parameters()),
        "vocab_size": recipe.task.vocab_size,
        "train_seconds": tested - began,
        "test_seconds": time.monotonic() - tested,
        "seed": args.seed,
        "dtype": args.dtype,
        **settings,
    }


def _environment(device: torch.device) -> dict[str, Any]:
    facts = {**environment(), "device": str(device)}
    if device.type == "cuda":
        facts["gpu"] = torch.cuda.get_device_name(device)
    return facts


def _write(out: Path, document: dict[str, Any]) -> None:
    checkpoint.write_file(out / "tasks.json", (json.dumps(document, indent=1) + "\n").encode())
    checkpoint.write_file(out / "tasks.txt", (table(document["results"]) + "\n").encode())
    checkpoint.write_file(out / "tasks.png", plot(document["results"]))


def table(rows: list[dict[str, Any]]) -> str:
    """Accuracy in percent, and the steps taken: a line a model, a column a length, the tasks one below the other."""
    parts = []
    for name in dict.fromkeys(row["task"] for row in rows):
        mine = [row for row in rows if row["task"] == name]
        first = mine[0]
        title = (
            f"{TASKS[name].title}: accuracy in percent, chance {100 * first['chance']:.3g}; "
            f"trained on up to {max(first['train_lengths'])} {first['unit']}"
        )
        lines = [f"  {first['unit']:<12}" + "".join(f"{length:>7}" for length in first["accuracy"]) + "   steps"]
        lines += [
            f"  xLSTM[{row['model']}]  " + _percent(row["accuracy"].values()) + f"{row['steps']:>8}" for row in mine
        ]
        parts.append("\n".join([title, *lines]))
    return "\n\n".join(parts)


def _percent(values: Iterable[float]) -> str:
    return "".join(f"{100 * value:>7.1f}" for value in values)


def plot(rows: list[dict[str, Any]]) -> bytes:
    """The same as a PNG picture, a panel a task; the lengths that were trained on are shaded."""
    names = list(dict.fromkeys(row["task"] for row in rows))
    figure = Figure(figsize=(1 + 4.2 * len(names), 4), dpi=120, layout="constrained")
    canvas = FigureCanvasAgg(figure)
    for axes, name in zip(figure.subplots(1, len(names), squeeze=False)[0], names, strict=True):
        mine = [row for row in rows if row["task"] == name]
        for row in mine:
            lengths = [int(length) for length in row["accuracy"]]
            axes.plot(lengths, [100 * a for a in row["accuracy"].values()], "o-", label=f"xLSTM[{row['model']}]")
        axes.axvspan(0, max(mine[0]["train_lengths"]), color="gray", alpha=0.15, label="trained on")
        axes.axhline(100 * mine[0]["chance"], color="gray", linestyle="--", linewidth=1, label="chance")
        axes.set(title=TASKS[name].title, xlabel=f"length in {mine[0]['unit']}", ylabel="accuracy in percent")
        axes.set_ylim(0, 103)
        axes.grid(alpha=0.3)
    figure.axes[0].legend()
    picture = io.BytesIO()
    canvas.print_png(picture)
    return picture.getvalue()
