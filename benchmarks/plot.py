"""Plots of subject mlstm: `python benchmarks/plot.py RESULTS.json [--out FOLDER]`.

Writes mlstm_time_*.png (time over seq at a constant number of tokens, a line a peer) for each number of heads, dqk and
dv that was measured at two or more seq, and mlstm_speedup.png (our speedup over TFLA at every setting).
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

LABELS = {
    "flash_xlstm": "flash-xlstm",
    "tfla": "TFLA (triton_xl_chunk)",
    "tfla_limit_chunk": "triton_limit_chunk",
    "tfla_siging": "TFLA, sigmoid input gate",
    "simple_gla": "chunk_simple_gla",
    "cudnn_attention": "cuDNN causal attention",
    "plain_pytorch": "plain PyTorch",
}
COLORS = dict(zip(LABELS, plt.rcParams["axes.prop_cycle"].by_key()["color"], strict=False))
PASSES = ("forward", "forward+backward")
DIMS = ("heads", "dqk", "dv", "dtype")


def _title(dims: tuple) -> str:
    heads, dqk, dv, dtype = dims
    return f"{heads} heads, {dqk} x {dv}, {dtype}"


def plot_time(rows: list[dict], dims: tuple, gpu: str, path: Path) -> None:
    figure, axes = plt.subplots(1, 2, figsize=(11, 4.5), constrained_layout=True)
    for axis, pass_name in zip(axes, PASSES, strict=True):
        for name, label in LABELS.items():
            points = sorted((r["seq"], r["time_ms"]) for r in rows if r["peer"] == name and r["pass"] == pass_name)
            if points:
                style = {"linewidth": 2.5 if name == "flash_xlstm" else 1.3, "color": COLORS[name]}
                axis.plot(*zip(*points, strict=True), marker="o", label=label, **style)
        seqs = sorted({r["seq"] for r in rows})
        axis.set(xscale="log", yscale="log", title=pass_name, xlabel="seq", ylabel="ms")
        axis.set_xticks(seqs, [str(s) for s in seqs])
        axis.minorticks_off()
        axis.grid(alpha=0.3)
    axes[0].legend(fontsize=8)
    tokens = rows[0]["batch"] * rows[0]["seq"]
    figure.suptitle(f"mLSTM, {tokens} tokens, {_title(dims)}; {gpu}")
    figure.savefig(path, dpi=150)
    plt.close(figure)


def plot_speedup(rows: list[dict], gpu: str, path: Path) -> bool:
    times = {(r["peer"], r["pass"], r["batch"], r["seq"], *(r[d] for d in DIMS)): r["time_ms"] for r in rows}
    ratios: dict[str, dict[tuple, float]] = {pass_name: {} for pass_name in PASSES}
    for (peer, pass_name, *key), ours in times.items():
        theirs = times.get(("tfla", pass_name, *key))
        if peer == "flash_xlstm" and theirs is not None:
            batch, seq, heads, dqk, dv, _ = key
            ratios[pass_name][(dqk, dv, heads, seq, batch)] = theirs / ours
    labels = sorted({key for by_key in ratios.values() for key in by_key})
    if not labels:
        return False
    size = (max(8, 0.16 * len(labels)), 4.8)
    figure, axis = plt.subplots(figsize=size, constrained_layout=True)
    for pass_name, marker in zip(PASSES, "os", strict=True):
        by_key = ratios[pass_name]
        if by_key:
            median = statistics.median(by_key.values())
            shown = [(x, by_key[key]) for x, key in enumerate(labels) if key in by_key]
            axis.plot(*zip(*shown, strict=True), marker, markersize=4, label=f"{pass_name}, median {median:.2f}")
    axis.axhline(1.0, color="black", linewidth=0.8)
    names = [f"{dqk}x{dv}, {heads} heads, {batch}x{seq}" for dqk, dv, heads, seq, batch in labels]
    axis.set_xticks(range(len(labels)), names, rotation=90, fontsize=5)
    axis.set(ylabel="TFLA's time over ours", title=f"Speedup over TFLA (dqk x dv, heads, batch x seq); {gpu}")
    axis.set_ylim(bottom=0)
    axis.grid(axis="y", alpha=0.3)
    axis.legend()
    figure.savefig(path, dpi=150)
    plt.close(figure)
    return True


def plot(document: dict, folder: Path) -> list[Path]:
    """Writes what the results allow; returns the files."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = [r for r in document["results"] if r.get("what") == "mlstm" and "time_ms" in r]
    gpu = document["environment"].get("gpu", "CPU")
    written = []
    for dims in sorted({tuple(r[d] for d in DIMS) for r in rows}):
        same = [r for r in rows if tuple(r[d] for d in DIMS) == dims]
        if len({r["seq"] for r in same}) > 1 and len({r["batch"] * r["seq"] for r in same}) == 1:
            written.append(folder / f"mlstm_time_{'_'.join(map(str, dims))}.png")
            plot_time(same, dims, gpu, written[-1])
    if plot_speedup(rows, gpu, folder / "mlstm_speedup.png"):
        written.append(folder / "mlstm_speedup.png")
    return written


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("results", type=Path)
    parser.add_argument("--out", type=Path, help="folder; default: that of the results")
    args = parser.parse_args()
    for path in plot(json.loads(args.results.read_text()), args.out or args.results.parent):
        print(path)


if __name__ == "__main__":
    main()
