"""Tables for docs/benchmarks.md: `python benchmarks/report.py RESULTS.json ...`. The subjects train and precision have
tables of their own. Of the others it is the summary, or the rows where there is none, without columns that say nothing.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path


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
        if "error" in row:  # a peer's process that ended early says no shape
            lines.append((row["case"], "", row["error"][:120], *[""] * 6))
            continue
        shape = f"{row['batch']} x {row['seq']:,}"
        lines.append((
            row["case"], shape, _number(row["time_ms"], 1), _number(row.get("peak_gib"), 1),
            _number(row["tokens_per_s"]), _number(row["tflops"]), f"{100 * row['share']:.1f}%",
            _number(row["products_ms"], 1), _number(row["step_over_products"], 2),
        ))  # fmt: skip
    return table(head, lines)


def _profiles(rows: list[dict], kept: dict[str, float]) -> str:
    from train import CLASSES  # here, because it imports torch, which takes seconds

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


def _cell(value: object) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    return f"{len(value)} values" if isinstance(value, list) else "" if value is None else str(value)


def _any_rows(rows: list[dict]) -> str:
    """A table of rows that have about the same columns; below it what all rows have in common."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    same = [name for name in names if len(rows) > 1 and len({_cell(row.get(name)) for row in rows}) == 1]
    head = [name for name in names if name not in same]
    text = table(head, [[_cell(row.get(name)) for name in head] for row in rows])
    common = ", ".join(f"{name} {_cell(rows[0][name])}" for name in same if name in rows[0])
    return text + (f"\n\nIn all of them: {common}." if common else "")


def _others(document: dict) -> list[str]:
    rows = [row for row in document["results"] if row.get("what") not in ("rates", "absent", "host")]
    kinds: dict[tuple, list[dict]] = {}
    for row in document.get("summary") or rows:
        kinds.setdefault((row.get("what"), "speedup_over" in row, "claim" in row), []).append(row)
    absent = [row for row in document["results"] if row.get("what") == "absent"]
    names = "; ".join(f"{row.get('peer', row.get('model'))}: {row['error']}" for row in absent)
    return [*map(_any_rows, kinds.values()), *([f"Not measured: {names}."] if names else [])]


def report(document: dict) -> list[str]:
    """The tables that the results allow."""
    of = {
        what: [row for row in document["results"] if row.get("what") == what]
        for what in ("train", "profile", "precision")
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
    return [write(rows) for rows, write in found if rows] or _others(document)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("results", type=Path, nargs="+")
    parts = []
    for file in parser.parse_args().results:
        document = json.loads(file.read_text())
        facts = document["environment"]
        where = facts.get("gpu") or facts.get("cpu")
        parts.append(f"## {document['subject']}\n\n{where}, torch {facts.get('torch')}, {facts.get('date')}")
        parts += report(document)
    print("\n\n".join(parts))


if __name__ == "__main__":
    main()
