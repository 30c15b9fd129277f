"""Results of the tasks: a row a model, a table and a plot of rows."""

from __future__ import annotations

import io
import math
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict
from typing import Any

import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from flash_xlstm.training.tasks.data import TASKS
from flash_xlstm.training.tasks.recipes import Recipe, build
from flash_xlstm.training.tasks.training import accuracy, train


def measure(
    name: str,
    recipe: Recipe,
    kind: str,
    device: torch.device,
    *,
    steps: int | None = None,
    seconds: float = math.inf,
    seed: int = 0,
    dtype: str = "float32",
    cuda_graphs: bool = True,
    stepped: Callable[[float | None], None] = lambda loss: None,
) -> dict[str, Any]:
    """Trains and tests a model.

    Args:
        name: of the task, as in :data:`.data.TASKS`.
        recipe: how it is trained and tested.
        kind: of the model, as in :data:`.recipes.MODELS`.
        device: to train on.
        steps: most optimizer steps; default: the recipe's.
        seed: of weights and data.
        dtype: "float32" or "bfloat16", to compute in.
        seconds, cuda_graphs, stepped: as for :func:`.training.train`.

    Returns:
        A row of the results: the settings, the accuracy at each length, steps and seconds.

    Raises:
        TrainingError: the loss is not finite.
    """
    torch.manual_seed(seed)
    model = build(recipe, kind).to(device)
    compute = getattr(torch, dtype)
    generator = torch.Generator(device).manual_seed(seed)
    began = time.monotonic()
    most = steps or recipe.steps
    trained = train(
        model,
        recipe,
        most,
        generator,
        compute,
        title_of(name, kind),
        seconds=seconds,
        cuda_graphs=cuda_graphs,
        stepped=stepped,
    )
    tested = time.monotonic()
    right = {length: accuracy(model, recipe, length, generator, compute) for length in recipe.test_lengths}
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
        "seed": seed,
        "dtype": dtype,
        **settings,
    }


def title_of(name: str, kind: str) -> str:
    """A row's name."""
    return f"{name} xLSTM[{kind}]"


def table(rows: list[dict[str, Any]]) -> str:
    """A text table for each task: a line a model, a column a length, accuracy in percent, and the steps taken."""
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
    """The same as a PNG picture with a panel for each task. The training lengths are shaded."""
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
