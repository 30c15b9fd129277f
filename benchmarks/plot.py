"""Plots of results: `python benchmarks/plot.py RESULTS.json ... [--out FOLDER]`.

Pictures are named after the results file. For subject mlstm, RESULTS.png has the time over seq at a constant number of
tokens, a line a peer (RESULTS_HEADS_DQK_DV_DTYPE.png where several sizes were measured at two or more seq).
RESULTS_speedup.png has our speedup over TFLA and simple_gla where two or more sizes were measured. For decode,
RESULTS.png has the time a token over batch. For prefill, RESULTS.png has the time over length; RESULTS_memory.png has
the memory of the state and the peak memory of reading the prompt, over length. For precision, RESULTS.png has
the training loss over steps, a line a precision. For cpu, RESULTS.png has our share of the bare products. For train,
RESULTS.png has time and peak memory of a step, a bar a case, with the step's products beside the time;
RESULTS_tokens.png has the time a token over seq at constant tokens.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib import ticker

LABELS = {
    "flash_xlstm": "flash-xlstm",
    "flash_xlstm_sig": "flash-xlstm, sigmoid input gate",
    "tfla": "TFLA (triton_xl_chunk)",
    "tfla_limit_chunk": "triton_limit_chunk",
    "tfla_siging": "TFLA, sigmoid input gate",
    "simple_gla": "chunk_simple_gla",
    "mamba2": "Mamba-2 SSD",
    "cudnn_attention": "cuDNN causal attention",
    "plain_pytorch": "plain PyTorch",
}
COLORS = dict(zip(LABELS, plt.rcParams["axes.prop_cycle"].by_key()["color"], strict=False))
PASSES = ("forward", "forward+backward")
DIMS = ("heads", "dqk", "dv", "dtype")


def _title(dims: tuple) -> str:
    heads, dqk, dv, dtype = dims
    return f"{heads} heads, {dqk} x {dv}, {dtype}"


def _log_ticks(axis) -> None:
    """Plain numbers at 1, 2 and 5 times powers of ten on the y axis."""
    axis.yaxis.set_major_locator(ticker.LogLocator(subs=(1.0, 2.0, 5.0), numticks=20))
    axis.yaxis.set_major_formatter(ticker.FuncFormatter(lambda y, _: f"{y:g}"))
    axis.minorticks_off()


def plot_time(rows: list[dict], dims: tuple, gpu: str, path: Path) -> None:
    figure, axes = plt.subplots(1, 2, figsize=(12, 4.5), constrained_layout=True)
    for axis, pass_name in zip(axes, PASSES, strict=True):
        for name, label in LABELS.items():
            points = sorted((r["seq"], r["time_ms"]) for r in rows if r["peer"] == name and r["pass"] == pass_name)
            if points:
                style = {"linewidth": 2.5 if name == "flash_xlstm" else 1.3, "color": COLORS[name]}
                axis.plot(*zip(*points, strict=True), marker="o", label=label, **style)
        seqs = sorted({r["seq"] for r in rows})
        axis.set(xscale="log", yscale="log", title=pass_name, xlabel="seq", ylabel="ms")
        axis.set_xticks(seqs, [str(s) for s in seqs])
        _log_ticks(axis)
        axis.grid(alpha=0.3)
    handles = {label: line for axis in axes for line, label in zip(*axis.get_legend_handles_labels(), strict=True)}
    figure.legend(handles.values(), handles.keys(), loc="outside right center", fontsize=8)
    tokens = rows[0]["batch"] * rows[0]["seq"]
    figure.suptitle(f"mLSTM, {tokens} tokens, {_title(dims)}; {gpu}")
    figure.savefig(path, dpi=150)
    plt.close(figure)


def plot_speedup(rows: list[dict], gpu: str, path: Path) -> bool:
    """A panel for each pass. A column for dqk and dv has the settings by heads, then by seq."""
    times = {(r["peer"], r["pass"], r["batch"], r["seq"], *(r[d] for d in DIMS)): r["time_ms"] for r in rows}
    ratios: dict[tuple, dict[tuple, float]] = {}
    for (peer, pass_name, *key), ours in times.items():
        batch, seq, heads, dqk, dv, dtype = key
        for other in ("tfla", "simple_gla") if peer == "flash_xlstm" else ():
            theirs = times.get((other, pass_name, *key))
            if theirs is not None:
                ratios.setdefault((pass_name, other), {})[(dqk, dv, dtype), (heads, seq, batch)] = theirs / ours
    settings = {key for by_key in ratios.values() for key in by_key}
    if not settings:
        return False
    columns, within = (sorted({key[part] for key in settings}) for part in (0, 1))
    figure, axes = plt.subplots(2, 1, figsize=(10, 7), sharex=True, constrained_layout=True)
    for axis, pass_name in zip(axes, PASSES, strict=True):
        for (other, marker), by_key in (
            (x, ratios.get((pass_name, x[0]))) for x in (("tfla", "o"), ("simple_gla", "^"))
        ):
            if by_key:
                x = [columns.index(c) + 0.8 * ((within.index(w) + 0.5) / len(within) - 0.5) for c, w in by_key]
                y = list(by_key.values())
                label = f"{LABELS[other]}: median {statistics.median(y):.2f}, least {min(y):.2f}"
                axis.plot(x, y, marker, markersize=4, color=COLORS[other], label=label)
        axis.axhline(1.0, color="black", linewidth=0.8)
        for edge in range(1, len(columns)):
            axis.axvline(edge - 0.5, color="black", linewidth=0.3)
        axis.set(ylabel="their time over ours", title=pass_name)
        axis.set_ylim(bottom=0)
        axis.grid(axis="y", alpha=0.3)
        axis.legend(fontsize=8)
    heads, seqs = (sorted({w[part] for w in within}) for part in (0, 1))
    axes[1].set_xticks(range(len(columns)), [f"{dqk} x {dv}\n{dtype}" for dqk, dv, dtype in columns])
    axes[1].set_xlabel(f"dqk x dv; within: heads {', '.join(map(str, heads))}, each at seq {', '.join(map(str, seqs))}")
    figure.suptitle(f"Our speedup at every setting; {gpu}")
    figure.savefig(path, dpi=150)
    plt.close(figure)
    return True


MODELS = {"flash_xlstm": "flash-xlstm", "xlstm_large": "NX-AI xlstm_large (Triton)", "transformers": "transformers"}
MODEL_COLORS = {name: f"C{index}" for index, name in enumerate(MODELS)}
MODE_STYLES = {"graph": "-", "generate": "--", "eager": ":"}


def _axes(title: str, xlabel: str, ylabel: str, ticks: list[int]):
    figure, axis = plt.subplots(figsize=(7, 5.6), constrained_layout=True)
    axis.set(xscale="log", yscale="log", title=title, xlabel=xlabel, ylabel=ylabel)
    axis.set_xticks(ticks, [str(tick) for tick in ticks])
    _log_ticks(axis)
    axis.grid(alpha=0.3)
    return figure, axis


def _save(figure, axis, path: Path) -> Path:
    figure.legend(*axis.get_legend_handles_labels(), loc="outside lower center", ncols=2, fontsize=8)
    figure.savefig(path, dpi=150)
    plt.close(figure)
    return path


def _line(axis, rows: list[dict], x: str, y: str, **style) -> None:
    points = sorted((row[x], row[y]) for row in rows if y in row)
    if points:
        axis.plot(*zip(*points, strict=True), **style)


def plot_decode(rows: list[dict], gpu: str, path: Path) -> Path:
    batches = sorted({row["batch"] for row in rows})
    figure, axis = _axes(f"Decoding, {rows[0]['size']}; {gpu}", "batch", "ms a token", batches)
    for (model, label), (mode, dashes) in itertools.product(MODELS.items(), MODE_STYLES.items()):
        same = [row for row in rows if row["model"] == model and row["mode"] == mode]
        style = {"color": MODEL_COLORS[model], "linestyle": dashes, "marker": "o"}
        _line(axis, same, "batch", "time_ms", label=f"{label}, {mode}", **style)
    ours = [row for row in rows if row["model"] == "flash_xlstm" and row["mode"] == "eager"]
    _line(axis, ours, "batch", "floor_ms", color="black", linewidth=0.8, label="weights and states at copy bandwidth")
    return _save(figure, axis, path)


def plot_prefill(rows: list[dict], gpu: str, folder: Path, stem: str) -> list[Path]:
    rows = [row for row in rows if row["batch"] == 1]
    if not rows:
        return []
    seqs, size = sorted({row["seq"] for row in rows}), rows[0]["size"]
    ours = [row for row in rows if row["model"] == "flash_xlstm"]
    figure, axis = _axes(f"Reading a prompt, {size}, batch 1; {gpu}", "tokens", "ms", seqs)
    for model, label in MODELS.items():
        same = [row for row in rows if row["model"] == model]
        _line(axis, same, "seq", "time_ms", color=MODEL_COLORS[model], marker="o", label=label)
    _line(axis, ours, "seq", "floor_ms", color="black", linewidth=0.8, label="the weights' products at full rate")
    written = [_save(figure, axis, folder / f"{stem}.png")]
    figure, axis = _axes(f"Memory of a prompt, {size}, batch 1; {gpu}", "tokens", "MiB", seqs)
    _line(axis, ours, "seq", "state_mib", marker="o", label="flash-xlstm, kept")
    _line(axis, ours, "seq", "peak_memory_mib", marker="o", label="flash-xlstm, at the peak of reading it")
    style = {"linestyle": "--", "label": "keys and values of a Transformer of this width and depth (computed)"}
    _line(axis, ours, "seq", "transformer_mib", color="black", **style)
    return [*written, _save(figure, axis, folder / f"{stem}_memory.png")]


PRECISIONS = {
    "float32": "float32",
    "bfloat16_autocast": "bfloat16, float32 weights",
    "bfloat16": "bfloat16 throughout",
    "float32_again": "float32, other roundings",
    "float16_scaled": "float16, loss scaling",
    "float8": "float8",
}


def plot_precision(rows: list[dict], gpu: str, path: Path) -> Path:
    """The whole run, and its last quarter enlarged."""
    figure, axes = plt.subplots(1, 2, figsize=(12, 5.2), constrained_layout=True)
    for row in rows:
        window, losses = row["window"], row["train_losses"]
        steps = [min((x + 1) * window, row["steps"]) for x in range(len(losses))]
        label = f"{PRECISIONS[row['precision']]}: {row['held_out_loss']:.4f}"
        if row["precision"] != "float32" and "over_float32" in row:
            label += f" ({100 * row['over_float32']:+.2f}%)"
        last = len(steps) * 3 // 4
        axes[0].plot(steps, losses, linewidth=1.2, label=label)
        axes[1].plot(steps[last:], losses[last:], linewidth=1.2)
    axes[0].set(xlabel="step", ylabel="loss, nats a byte", title="training")
    axes[1].set(xlabel="step", title="its last quarter")
    for axis in axes:
        axis.grid(alpha=0.3)
    figure.legend(loc="outside lower center", ncols=3, fontsize=8, title="held-out loss at the end (over float32's)")
    millions = rows[0]["parameters"] / 1e6
    figure.suptitle(f"{millions:.1f} M parameters, {rows[0]['batch']} x {rows[0]['seq']} bytes a step; {gpu}")
    figure.savefig(path, dpi=150)
    plt.close(figure)
    return path


def plot_train(rows: list[dict], gpu: str, folder: Path, stem: str) -> list[Path]:
    constant = sorted((row for row in rows if row["case"].startswith("tokens_")), key=lambda row: row["seq"])
    steps = [row for row in rows if row not in constant]
    written = []
    if steps:
        figure, axes = plt.subplots(1, 2, figsize=(12, 1.5 + 0.4 * len(steps)), sharey=True, constrained_layout=True)
        names = [f"{row['case']}, {row['batch']} x {row['seq']}" for row in steps]
        for axis, name, unit in zip(axes, ("time_ms", "peak_gib"), ("ms a step", "GiB at the peak"), strict=True):
            bars = axis.barh(names, [row.get(name, 0.0) for row in steps], height=0.6)
            axis.bar_label(bars, fmt="%.0f", padding=3, fontsize=8)
            axis.set(xlabel=unit)
            axis.grid(axis="x", alpha=0.3)
        products = [row["products_ms"] for row in steps]
        axes[0].plot(products, names, "k|", markersize=18, label="the step's products by themselves")
        axes[0].invert_yaxis()
        axes[0].legend(fontsize=8)
        figure.suptitle(f"A training step; {gpu}")
        written.append(folder / f"{stem}.png")
        figure.savefig(written[-1], dpi=150)
        plt.close(figure)
    if len(constant) > 1:
        tokens = constant[0]["batch"] * constant[0]["seq"]
        title = f"Training, {tokens:,} tokens a step; {gpu}"
        figure, axis = plt.subplots(figsize=(7, 4.2), constrained_layout=True)
        per_token = [row["time_ms"] / row["batch"] / row["seq"] * 1e6 for row in constant]
        seqs = [row["seq"] for row in constant]
        axis.plot(seqs, per_token, marker="o")
        axis.set(xscale="log", title=title, xlabel="seq", ylabel="ns a token", ylim=(0, 1.2 * max(per_token)))
        axis.set_xticks(seqs, [f"{seq:,}" for seq in seqs])
        axis.minorticks_off()
        axis.grid(alpha=0.3)
        written.append(folder / f"{stem}_tokens.png")
        figure.savefig(written[-1], dpi=150)
        plt.close(figure)
    return written


def plot_cpu(rows: list[dict], cpu: str, path: Path) -> Path:
    """The share of the bare products: a panel an op and pass, a bar a size, dtype and number of threads."""
    panels = sorted({(row["what"], row["pass"]) for row in rows}, reverse=True)
    figure, axes = plt.subplots(len(panels), 1, figsize=(9, 0.35 * len(rows) + 1.2 * len(panels)), squeeze=False)
    for axis, panel in zip(axes[:, 0], panels, strict=True):
        same = [row for row in rows if (row["what"], row["pass"]) == panel]
        names = [f"{row['size']}, {row['dtype']}, {row['threads']} threads" for row in same]
        axis.bar_label(axis.barh(names, [row["share"] for row in same], height=0.6), fmt="%.2f", padding=3, fontsize=8)
        axis.set(title=", ".join(panel), xlim=(0, 1.15 * max(1.0, *(row["share"] for row in same))))
        axis.axvline(1.0, color="black", linewidth=0.8)
        axis.tick_params(labelsize=8)
        axis.invert_yaxis()
    axes[-1, 0].set_xlabel("time of the bare products over ours")
    figure.suptitle(f"Ops on a CPU; {cpu}")
    figure.tight_layout()
    figure.savefig(path, dpi=150)
    plt.close(figure)
    return path


def plot(document: dict, folder: Path, stem: str) -> list[Path]:
    """Writes the plots that the results allow, under names that begin with `stem`. Returns the files."""
    folder.mkdir(parents=True, exist_ok=True)
    gpu = document["environment"].get("gpu", "CPU")
    timed = [r for r in document["results"] if "time_ms" in r]
    rows, decode, prefill = ([r for r in timed if r.get("what") == what] for what in ("mlstm", "decode", "prefill"))
    written = []
    shares = [r for r in document["results"] if "share" in r and document.get("subject") == "cpu"]
    if shares:
        written.append(plot_cpu(shares, document["environment"].get("cpu", "CPU"), folder / f"{stem}.png"))
    if decode:
        written.append(plot_decode(decode, gpu, folder / f"{stem}.png"))
    written += plot_prefill(prefill, gpu, folder, stem)
    written += plot_train([r for r in timed if r.get("what") == "train"], gpu, folder, stem)
    trained = [r for r in document["results"] if r.get("what") == "precision" and "held_out_loss" in r]
    if trained:
        written.append(plot_precision(trained, gpu, folder / f"{stem}.png"))
    all_dims = sorted({tuple(r[d] for d in DIMS) for r in rows})
    for dims in all_dims:
        same = [r for r in rows if tuple(r[d] for d in DIMS) == dims]
        if len({r["seq"] for r in same}) > 1 and len({r["batch"] * r["seq"] for r in same}) == 1:
            written.append(folder / f"{stem}{'' if len(all_dims) == 1 else '_' + '_'.join(map(str, dims))}.png")
            plot_time(same, dims, gpu, written[-1])
    if len(all_dims) > 1 and plot_speedup(rows, gpu, folder / f"{stem}_speedup.png"):
        written.append(folder / f"{stem}_speedup.png")
    return written


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("results", type=Path, nargs="+")
    parser.add_argument("--out", type=Path, help="folder; default: that of the results")
    args = parser.parse_args()
    for file in args.results:
        for path in plot(json.loads(file.read_text()), args.out or file.parent, file.stem):
            print(path)


if __name__ == "__main__":
    main()
