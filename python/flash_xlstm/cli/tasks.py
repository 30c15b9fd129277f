"""``flash-xlstm tasks``: what xLSTM[1:0], [0:1] and [1:1] can learn of state tracking and recall (arXiv 2405.04517,
section 4.1)."""

from __future__ import annotations

import argparse
import datetime
import io
import json
import math
import platform
import sys
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from torch import nn
from torch.nn import functional as F
from tqdm import tqdm

import flash_xlstm
from flash_xlstm.cli import checkpoint
from flash_xlstm.cli.device import choose_device
from flash_xlstm.cli.errors import CommandError
from flash_xlstm.cli.metrics import autocast
from flash_xlstm.cli.task_data import IGNORED, TASKS, Task, recall
from flash_xlstm.nn import blocks

MODELS = {"1:0": [0, 0], "0:1": [1, 1], "1:1": [1, 0]}  # of the two blocks, which are sLSTM blocks
_CLIP = 1.0
_FINAL_RATE = 0.05  # of the peak, at the end of the cosine
_WARMUP = 0.05  # of the steps


@dataclass(frozen=True)
class Recipe:
    """How a task is trained and tested.

    Attributes:
        task: the task.
        shortest, longest: each batch has a length drawn evenly from these, both included.
        test_lengths: lengths of the sequences to test on.
        test_rows: sequences of each.
        embedding_dim, mlstm_heads, slstm_heads: sizes of the models.
        steps, batch_size, learning_rate, weight_decay: of AdamW, with warm-up and a cosine.
    """

    task: Task
    shortest: int
    longest: int
    test_lengths: tuple[int, ...]
    embedding_dim: int
    steps: int
    batch_size: int
    learning_rate: float
    test_rows: int = 2048
    weight_decay: float = 0.1
    mlstm_heads: int = 4
    slstm_heads: int = 1


_LENGTHS = (40, 80, 120, 160, 200, 240)  # one to six times the longest that is trained on


def _tracking(name: str, **sizes: Any) -> Recipe:
    return Recipe(TASKS[name], 1, 40, _LENGTHS, **sizes)


_STATE_TRACKING = [name for name in TASKS if name != "mqar"]
_FULL_SIZES: dict[str, Any] = {"embedding_dim": 64, "steps": 2000, "batch_size": 256, "learning_rate": 3e-3}
_SMALL_SIZES: dict[str, Any] = {"embedding_dim": 32, "steps": 600, "batch_size": 64, "learning_rate": 5e-3}
FULL = {
    **{name: _tracking(name, **_FULL_SIZES) for name in _STATE_TRACKING},
    "mqar": Recipe(
        TASKS["mqar"], 16, 64, (16, 32, 64, 128, 256),
        embedding_dim=256, steps=5000, batch_size=128, learning_rate=1e-3, test_rows=256,
    ),
}  # fmt: skip
SMALL = {
    **{name: _tracking(name, **_SMALL_SIZES, test_rows=1024) for name in _STATE_TRACKING},
    "mqar": Recipe(
        recall(64), 2, 8, (4, 8, 16, 24),
        embedding_dim=64, steps=1500, batch_size=64, learning_rate=3e-3, test_rows=256,
    ),
}  # fmt: skip


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
    for name in names:
        for model in args.models or MODELS:
            document["results"].append(_measure(name, recipes[name], model, device, args))
            document["seconds"] = time.monotonic() - began
            _write(out, document)
    print(table(document["results"]))
    print(f"{document['seconds']:.0f} s in all; results: {out / 'tasks.json'}, tasks.txt and tasks.png")
    return 0


def _measure(name: str, recipe: Recipe, kind: str, device: torch.device, args: argparse.Namespace) -> dict[str, Any]:
    """One row of the results."""
    torch.manual_seed(args.seed)
    model = build(recipe, kind).to(device)
    dtype = getattr(torch, args.dtype)
    generator = torch.Generator(device).manual_seed(args.seed)
    began = time.monotonic()
    steps = args.steps or recipe.steps
    loss = _train(model, recipe, steps, generator, dtype, f"{name} xLSTM[{kind}]")
    trained = time.monotonic()
    accuracy = {length: _accuracy(model, recipe, length, generator, dtype) for length in recipe.test_lengths}
    settings = {key: value for key, value in asdict(recipe).items() if key not in ("task", "test_lengths")}
    return {
        "task": name,
        "model": kind,
        "chance": recipe.task.chance,
        "unit": recipe.task.unit,
        "accuracy": accuracy,
        "last_loss": loss,
        "parameters": sum(p.numel() for p in model.parameters()),
        "vocab_size": recipe.task.vocab_size,
        "train_seconds": trained - began,
        "test_seconds": time.monotonic() - trained,
        "seed": args.seed,
        "dtype": args.dtype,
        **settings,
        "steps": steps,
    }


def build(recipe: Recipe, kind: str) -> blocks.xLSTMLMModel:
    """Two blocks and a token embedding, newly initialized from torch's random state."""
    slstm = blocks.sLSTMLayerConfig(
        num_heads=recipe.slstm_heads, bias_init="standard", recurrent_weight_init="standard"
    )
    config = blocks.xLSTMLMModelConfig(
        mlstm_block=blocks.mLSTMBlockConfig(blocks.mLSTMLayerConfig(num_heads=recipe.mlstm_heads)),
        slstm_block=blocks.sLSTMBlockConfig(slstm),
        vocab_size=recipe.task.vocab_size,
        num_blocks=len(MODELS[kind]),
        embedding_dim=recipe.embedding_dim,
        slstm_at=[index for index, is_slstm in enumerate(MODELS[kind]) if is_slstm],
    )
    model = blocks.xLSTMLMModel(config)
    model.reset_parameters()
    return model


def _train(
    model: blocks.xLSTMLMModel, recipe: Recipe, steps: int, generator: torch.Generator, dtype: torch.dtype, title: str
) -> float:
    """Trains, and returns the mean loss of the last tenth of the steps."""
    decay, rest = model.get_weight_decay_optim_groups()
    groups = [{"params": decay, "weight_decay": recipe.weight_decay}, {"params": rest, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=recipe.learning_rate, betas=(0.9, 0.95), fused=True)
    warmup, tail = max(1, round(_WARMUP * steps)), max(1, steps // 10)
    lengths = torch.Generator().manual_seed(generator.initial_seed())
    device, last, logged = generator.device, torch.zeros((), device=generator.device), 0.0
    model.train()
    interval = 0.1 if sys.stderr.isatty() else 10.0
    with tqdm(total=steps, unit="step", desc=title, dynamic_ncols=True, mininterval=interval) as bar:
        for step in range(steps):
            for group in optimizer.param_groups:
                group["lr"] = recipe.learning_rate * _rate(step, steps, warmup)
            length = int(torch.randint(recipe.shortest, recipe.longest + 1, (), generator=lengths))
            tokens, targets = recipe.task.sample(length, recipe.batch_size, generator)
            with autocast(device, dtype):
                logits = model(tokens)
            loss = F.cross_entropy(logits.float().flatten(0, 1), targets.flatten(), ignore_index=IGNORED)
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), _CLIP)
            optimizer.step()
            optimizer.zero_grad()
            if step >= steps - tail:
                last += loss.detach() / tail
            if step % max(1, steps // 50) == 0:  # reading a loss waits for the device
                logged = float(loss.detach())
                if not math.isfinite(logged):
                    raise CommandError(f"training of {title} diverged at step {step}: the loss is {logged:.3g}")
                bar.set_postfix_str(f"loss {logged:.4f}", refresh=False)
            bar.update()
    return float(last)


def _rate(step: int, steps: int, warmup: int) -> float:
    """Linear warm-up, then a cosine; as a fraction of the peak."""
    if step < warmup:
        return (step + 1) / warmup
    progress = (step - warmup) / max(1, steps - warmup)
    return _FINAL_RATE + (1 - _FINAL_RATE) * (1 + math.cos(math.pi * progress)) / 2


@torch.no_grad()
def _accuracy(
    model: blocks.xLSTMLMModel, recipe: Recipe, length: int, generator: torch.Generator, dtype: torch.dtype
) -> float:
    """The fraction of answers that are right, on new sequences of a length."""
    model.eval()
    right, asked = 0, 0
    for start in range(0, recipe.test_rows, recipe.batch_size):
        rows = min(recipe.batch_size, recipe.test_rows - start)
        tokens, targets = recipe.task.sample(length, rows, generator)
        with autocast(generator.device, dtype):
            answers = model(tokens).argmax(-1)
        if recipe.task.last_only:
            answers, targets = answers[:, -1:], targets[:, -1:]
        right += int((answers == targets)[targets != IGNORED].sum())
        asked += int((targets != IGNORED).sum())
    return right / asked


def _environment(device: torch.device) -> dict[str, Any]:
    facts: dict[str, Any] = {
        "date": datetime.date.today().isoformat(),
        "flash_xlstm": flash_xlstm.build_info(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cpu": _cpu_name(),
        "cpu_threads": torch.get_num_threads(),
        "device": str(device),
    }
    if device.type == "cuda":
        facts["gpu"] = torch.cuda.get_device_name(device)
    return facts


def _cpu_name() -> str:
    """As the kernel calls it, where it says; else what Python knows."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _write(out: Path, document: dict[str, Any]) -> None:
    checkpoint.write_file(out / "tasks.json", (json.dumps(document, indent=1) + "\n").encode())
    checkpoint.write_file(out / "tasks.txt", (table(document["results"]) + "\n").encode())
    checkpoint.write_file(out / "tasks.png", plot(document["results"]))


def table(rows: list[dict[str, Any]]) -> str:
    """Accuracy in percent: a line a model, a column a length, the tasks one below the other."""
    parts = []
    for name in dict.fromkeys(row["task"] for row in rows):
        mine = [row for row in rows if row["task"] == name]
        first = mine[0]
        title = (
            f"{TASKS[name].title}: accuracy in percent, chance {100 * first['chance']:.3g}; "
            f"trained on {first['shortest']} to {first['longest']} {first['unit']}"
        )
        lines = [f"  {first['unit']:<12}" + "".join(f"{length:>7}" for length in first["accuracy"])]
        lines += [f"  xLSTM[{row['model']}]  " + _percent(row["accuracy"].values()) for row in mine]
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
        axes.axvspan(mine[0]["shortest"], mine[0]["longest"], color="gray", alpha=0.15, label="trained on")
        axes.axhline(100 * mine[0]["chance"], color="gray", linestyle="--", linewidth=1, label="chance")
        axes.set(title=TASKS[name].title, xlabel=f"length in {mine[0]['unit']}", ylabel="accuracy in percent")
        axes.set_ylim(0, 103)
        axes.grid(alpha=0.3)
    figure.axes[0].legend()
    picture = io.BytesIO()
    canvas.print_png(picture)
    return picture.getvalue()
