"""Tables for docs/benchmarks.md: `python benchmarks/report.py RESULTS.json`, of the subjects train and precision."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

from train import CLASSES


def table(head: Sequence[str], lines: Sequence[Sequence[object]]) -> str:
    """Markdown."""
    rows = [head, ["---"] * len(head), *lines]
    return "\n".join("| " + " | ".join(map(str, row)) + " |" for row in rows)


def _number(value: float | None, digits: int = 0) -> str:
    return "" if value is None else f"{value:,.{digits}f}"


def _steps(rows: list[dict]) -> str:
    head = (
        "case",
        "batch x seq",
        "ms",
        "peak, GiB",
        "tokens/s",
        "TFLOP/s",
        "of 989",
        "products, ms",
        "step in products",
    )
    lines = []
    for row in rows:
        shape = f"{row['batch']} x {row['seq']:,}"
        if "error" in row:
            lines.append((row["case"], shape, row["error"], *[""] * 6))
            continue
        lines.append((
            row["case"], shape, _number(row["time_ms"], 1), _number(row.get("peak_gib"), 1),
            _number(row["tokens_per_s"]), _number(row["tflops"]), f"{100 * row['share']:.1f}%",
            _number(row["products_ms"], 1), _number(row["step_over_products"], 2),
        ))  # fmt: skip
    return table(head, lines)


def _profiles(rows: list[dict], kept: dict[str, float]) -> str:
    groups = (*CLASSES, "rest")
    order = sorted(groups, key=lambda group: group != "products")
    lines = [
        (row["case"], *(_number(row[f"{group}_ms"], 1) for group in (*order, "all")), _number(kept.get(row["case"])))
        for row in rows
    ]
    return table(("GPU time a step, ms", *order, "together", "bytes kept a token and block"), lines)


def _constant(rows: list[dict]) -> str:
    rows = sorted((row for row in rows if "time_ms" in row), key=lambda row: row["seq"])
    per_token = [row["time_ms"] / row["batch"] / row["seq"] * 1e6 for row in rows]
    lines = [
        (f"{row['batch']} x {row['seq']:,}", _number(row["time_ms"], 1), f"{ns:.1f}", f"{ns / per_token[0]:.3f}")
        for row, ns in zip(rows, per_token, strict=True)
    ]
    return table(("batch x seq", "ms a step", "ns a token", "of the shortest rows'"), lines)


def _precisions(rows: list[dict]) -> str:
    lines = [
        (row["precision"], f"{row['held_out_loss']:.4f}", f"{100 * row['over_float32']:+.2f}%", _number(row["seconds"]))
        for row in rows
        if "over_float32" in row
    ]
    return table(("precision", "held-out loss", "over float32's", "seconds"), lines)


def report(document: dict) -> list[str]:
    """The tables that the results allow."""
    of = {
        what: [row for row in document["results"] if row["what"] == what] for what in ("train", "profile", "precision")
    }
    constant = [row for row in of["train"] if row["case"].startswith("tokens_")]
    steps = [row for row in of["train"] if row not in constant]
    kept = {row["case"]: row["block_bytes"] for row in steps if "block_bytes" in row}
    found = [
        (steps, _steps),
        (of["profile"], lambda rows: _profiles(rows, kept)),
        (constant, _constant),
        (of["precision"], _precisions),
    ]
    return [write(rows) for rows, write in found if rows]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("results", type=Path)
    print("\n\n".join(report(json.loads(parser.parse_args().results.read_text()))))


if __name__ == "__main__":
    main()
