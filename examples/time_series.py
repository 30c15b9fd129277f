"""Forecasts a year of monthly carbon dioxide at Mauna Loa with a small sLSTM, beside the seasonal naive forecast.

``python examples/time_series.py --out FOLDER`` trains on all but the last eight years of the weekly series that
statsmodels ships (1958 to 2001, Keeling and Whorf), averaged to months, and forecasts the next twelve months from every
month of those eight years. It writes results.json and forecast.png. Needs statsmodels, pandas, matplotlib and tqdm.
"""

from __future__ import annotations

import argparse
import datetime
import json
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from torch import Tensor, nn
from tqdm import trange

from flash_xlstm.cli.info import environment
from flash_xlstm.nn import block_stack

SEASON = HORIZON = 12  # months
HELD_OUT = 8 * 12
CROP = 10 * 12  # months of a training sequence


def load_series() -> tuple[list[datetime.date], Tensor]:
    """Months, and the mean of each month's weekly measurements in parts per million; gaps are interpolated."""
    try:
        from statsmodels.datasets import co2
    except ImportError as error:
        raise SystemExit(f"the series is part of statsmodels: pip install statsmodels pandas ({error})") from error
    monthly = co2.load_pandas().data["co2"].resample("MS").mean().interpolate()
    return [stamp.date() for stamp in monthly.index], torch.tensor(monthly.to_numpy(), dtype=torch.float32)


class Forecaster(nn.Module):
    """One sLSTM block between two linear layers.

    Reads changes over a year, (batch, months), and after each month predicts the next twelve: (batch, months, 12).
    """

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        slstm = block_stack.sLSTMLayerConfig(num_heads=4, bias_init="small_init", recurrent_weight_init="standard")
        config = block_stack.xLSTMBlockStackConfig(
            slstm_block=block_stack.sLSTMBlockConfig(slstm), embedding_dim=width, slstm_at="all", dropout=0.1
        )
        self.read = nn.Linear(1, width)
        self.stack = block_stack.xLSTMBlockStack(config)
        self.predict = nn.Linear(width, HORIZON)

    def forward(self, changes: Tensor) -> Tensor:
        # The model predicts the difference to the last change.
        return changes[..., None] + self.predict(self.stack(self.read(changes[..., None])))


@dataclass(frozen=True)
class Scaling:
    """Mean and deviation of the changes over a year, from the training data alone."""

    mean: float
    deviation: float

    def __call__(self, values: Tensor) -> Tensor:
        return (values[SEASON:] - values[:-SEASON] - self.mean) / self.deviation

    def undo(self, scaled: Tensor) -> Tensor:
        return scaled * self.deviation + self.mean


def train(values: Tensor, steps: int, seed: int) -> tuple[Forecaster, Scaling]:
    """A forecaster fitted to a series."""
    torch.manual_seed(seed)
    yearly = values[SEASON:] - values[:-SEASON]
    scaling = Scaling(float(yearly.mean()), float(yearly.std()))
    changes = scaling(values)
    model = Forecaster()
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.1)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps)
    progress = trange(steps, desc="training", unit="step", dynamic_ncols=True)
    for _ in progress:
        starts = torch.randint(len(changes) - CROP - HORIZON + 1, (16, 1))
        window = changes[starts + torch.arange(CROP + HORIZON)]
        ahead = window[:, 1:].unfold(1, HORIZON, 1)[:, :CROP]  # [b, t, h]: the change h + 1 months after t
        loss = (model(window[:, :CROP]) - ahead).abs().mean()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        progress.set_postfix_str(f"loss {float(loss.detach()):.3f}", refresh=False)
    return model.eval(), scaling


@torch.no_grad()
def evaluate(model: Forecaster, scaling: Scaling, values: Tensor, held_out: int) -> dict[str, Tensor]:
    """Forecasts (origins, 12) from the month before the held-out years and from every held-out month with twelve months
    after it, beside the true values. Three baselines need no training: the value a year before, that plus the mean
    change of a year, and that plus the last year's change, from which the model starts."""
    origins = torch.arange(len(values) - held_out - 1, len(values) - HORIZON)
    months = origins[:, None] + 1 + torch.arange(HORIZON)
    changes = model(scaling(values)[None])[0, origins - SEASON]  # causal: a prediction depends on earlier months only
    naive = values[months - SEASON]
    return {
        "truth": values[months],
        "slstm": naive + scaling.undo(changes),
        "seasonal_naive": naive,
        "seasonal_naive_with_drift": naive + scaling.mean,
        "seasonal_naive_with_last_change": naive + (values[origins] - values[origins - SEASON])[:, None],
    }


def mean_absolute_errors(forecasts: dict[str, Tensor]) -> dict[str, float]:
    """The error of each forecast, over all origins and months."""
    truth = forecasts["truth"]
    return {name: float((f - truth).abs().mean()) for name, f in forecasts.items() if name != "truth"}


def plot(months: list[datetime.date], values: Tensor, forecasts: dict[str, Tensor], held_out: int, path: Path) -> None:
    """The held-out years, and the forecasts made once a year."""
    figure = Figure(figsize=(10, 5), dpi=120, layout="constrained")
    axes = figure.add_subplot()
    first = len(values) - held_out
    axes.plot(months[first - SEASON :], values[first - SEASON :], color="black", linewidth=1, label="measured")
    for name, color in (("slstm", "tab:blue"), ("seasonal_naive", "tab:orange")):
        for origin in range(0, len(forecasts[name]), HORIZON):
            span = months[first + origin : first + origin + HORIZON]
            label = name.replace("_", " ") if origin == 0 else None
            axes.plot(span, forecasts[name][origin], "--", color=color, linewidth=1.2, label=label)
    axes.set(ylabel="CO2 in parts per million")
    axes.set_title(f"Forecasts of {HORIZON} months, made every {HORIZON} months; nothing here was trained on")
    axes.grid(alpha=0.3)
    axes.legend()
    FigureCanvasAgg(figure).print_png(str(path))


def positive(text: str) -> int:
    """Reads a count of at least 1. argparse names the option in its error."""
    if int(text) < 1:
        raise ValueError(text)
    return int(text)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("time_series"), help="folder for the results")
    parser.add_argument("--steps", type=positive, default=600)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.set_num_threads(1)  # more threads do not speed up a model this small
    args.out.mkdir(parents=True, exist_ok=True)
    months, values = load_series()
    began = time.monotonic()
    model, scaling = train(values[:-HELD_OUT], args.steps, args.seed)
    seconds = time.monotonic() - began
    forecasts = evaluate(model, scaling, values, HELD_OUT)
    errors = mean_absolute_errors(forecasts)
    plot(months, values, forecasts, HELD_OUT, args.out / "forecast.png")
    results = {
        "subject": "time_series",
        "environment": environment(),
        "results": [
            {
                "series": "statsmodels co2, monthly means",
                "held_out": f"{months[-HELD_OUT]} to {months[-1]}",
                "origins": len(forecasts["truth"]),
                "horizon_months": HORIZON,
                "mean_absolute_error_ppm": errors,
                "steps": args.steps,
                "seed": args.seed,
                "parameters": sum(p.numel() for p in model.parameters()),
                "train_seconds": seconds,
            }
        ],
    }
    (args.out / "results.json").write_text(json.dumps(results, indent=1) + "\n")
    for name, error in errors.items():
        print(f"{name.replace('_', ' '):<28} mean absolute error {error:.3f} ppm")
    better = errors["slstm"] < errors["seasonal_naive"]
    print(f"results and plot: {args.out}")
    return 0 if better else 1


if __name__ == "__main__":
    raise SystemExit(main())
