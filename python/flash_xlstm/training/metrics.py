"""A run's measures: loss, held-out bits per byte, the table of its history, the loss curve."""

from __future__ import annotations

import contextlib
import csv
import io
import math
from typing import Any

import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from torch import Tensor

from flash_xlstm.models import xLSTMForCausalLM
from flash_xlstm.training.data import Corpus

COLUMNS = (
    "step",
    "loss",
    "bits_per_byte",
    "held_out_bits_per_byte",
    "learning_rate",
    "gradient_norm",
    "tokens_per_s",
    "mfu",
)
Row = dict[str, float]


def autocast(device: torch.device, dtype: torch.dtype) -> Any:
    """The context in which a model with float32 weights computes in `dtype`."""
    if dtype == torch.float32:
        return contextlib.nullcontext()
    return torch.autocast(device.type, dtype=dtype)


def cross_entropy(model: Any, sequences: Tensor, reduction: str = "mean") -> Tensor:
    """The loss in nats over (batch, seq + 1) sequences: each token is predicted from the tokens before it.

    The logits are never whole in memory. `reduction` is "mean" or "sum".
    """
    output = model(
        sequences[:, :-1],
        shift_labels=sequences[:, 1:],
        num_items_in_batch=1 if reduction == "sum" else None,
        skip_logits=True,
        use_cache=False,
        return_dict=True,
    )
    return output.loss


@torch.no_grad()
def held_out_bits_per_byte(
    model: xLSTMForCausalLM, corpus: Corpus, sequence_length: int, batch_size: int, dtype: torch.dtype
) -> float:
    """Bits per byte of the held-out text. Every token is predicted once, from the tokens before it in its sequence.

    The first token of the text has no prediction; it counts as a uniform guess.
    """
    tokens, device, was_training = corpus.held_out, model.device, model.training
    model.eval()
    nats = math.log(model.config.vocab_size)
    rows = (len(tokens) - 1) // sequence_length
    starts = sequence_length * torch.arange(rows)
    batches = [tokens[s[:, None] + torch.arange(sequence_length + 1)] for s in starts.split(batch_size) if len(s)]
    if rows * sequence_length + 1 < len(tokens):
        batches.append(tokens[None, rows * sequence_length :])
    for batch in batches:
        with autocast(device, dtype):
            nats += float(cross_entropy(model, batch.long().to(device), "sum"))
    model.train(was_training)
    return nats / math.log(2) / len(corpus.held_out_bytes)


def table(history: list[Row]) -> bytes:
    """The history of a run as CSV."""
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
    writer.writeheader()
    for row in history:
        writer.writerow({name: value if name == "step" else f"{value:.6g}" for name, value in row.items()})
    return text.getvalue().encode()


def loss_curve(history: list[Row], xz: float) -> bytes:
    """The history of a run as a PNG picture: bits per byte over steps, beside xz's."""
    figure = Figure(figsize=(8, 5), dpi=120, layout="constrained")
    canvas = FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for name, label, style in (("bits_per_byte", "training", "-"), ("held_out_bits_per_byte", "held out", "o")):
        points = [(row["step"], row[name]) for row in history if name in row]
        if points:
            axes.plot(*zip(*points, strict=True), style, label=label, linewidth=1)
    axes.axhline(xz, color="gray", linestyle="--", linewidth=1, label="xz -9e, held out")
    axes.set(xlabel="step", ylabel="bits per byte")
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    axes.legend()
    picture = io.BytesIO()
    canvas.print_png(picture)
    return picture.getvalue()
