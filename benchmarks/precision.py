"""Subject precision: one small model trained on real text, byte by byte, in several precisions.

Every precision starts from the same weights and reads the same batches in the same order. The text is that of the
Python installation's own standard library (sorted files, one in 20 held out), or of `--text`.

- float32: products in float32 (no TF32), the reference.
- float32_again: the same with a learning rate higher by 1e-6 of itself: how far runs lie apart that differ by rounding.
- bfloat16_autocast: float32 weights, `torch.autocast`.
- bfloat16: weights, gradients and AdamW's moments in bfloat16, nothing in float32 beside them.
- float16_scaled: float32 weights, `torch.autocast`, `torch.amp.GradScaler`.
- float8: as bfloat16_autocast, and the large linear layers' products by `flash_xlstm.training.convert_to_float8`, with
  each block compiled.

`held_out_loss` is the mean over held-out text behind the last step, nats a byte; `over_float32` is how far it is above
float32's; `train_losses` are means of `--window` steps.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import importlib
import math
import sysconfig
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor

from run import measured, pair

PRECISIONS = ("float32", "float32_again", "bfloat16_autocast", "bfloat16", "float16_scaled", "float8")
AUTOCAST = {"bfloat16_autocast": torch.bfloat16, "float16_scaled": torch.float16, "float8": torch.bfloat16}
MOST_BYTES = 2**26


def add_arguments(parser: argparse.ArgumentParser) -> None:
    cuda = torch.cuda.is_available()
    parser.add_argument("--precisions", nargs="+", choices=PRECISIONS, default=PRECISIONS)
    parser.add_argument("--text", nargs="+", type=Path, help="files; default: the standard library's sources")
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--shape", type=pair, default=(8, 512), help="batch x seq of a step")
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--blocks", type=int, default=6)
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--learning-rate", type=float, default=1e-3, help="at its highest")
    parser.add_argument("--recipe", default="rowwise", help="of float8, by torchao's name")
    parser.add_argument("--held-out-batches", type=int, default=64)
    parser.add_argument("--window", type=int, default=20, help="steps whose mean loss is one point of the curve")
    parser.add_argument("--device", default="cuda" if cuda else "cpu")


def read_text(files: list[Path] | None) -> tuple[bytes, bytes]:
    """Bytes to train on, and bytes held out."""
    if files is None:
        root = Path(sysconfig.get_path("stdlib"))
        files = sorted(p for p in root.rglob("*.py") if "site-packages" not in p.parts)
    texts = [path.read_bytes() for path in files]
    texts = [text for text in texts if _is_utf8(text)]
    if len(texts) == 1:  # a file: its last twentieth is held out
        cut = len(texts[0]) * 19 // 20
        return texts[0][:cut][:MOST_BYTES], texts[0][cut:]
    train = b"".join(text for place, text in enumerate(texts) if place % 20)
    return train[:MOST_BYTES], b"".join(texts[::20])


def _is_utf8(text: bytes) -> bool:
    try:
        text.decode()
    except UnicodeDecodeError:
        return False
    return bool(text)


def learning_rate(step: int, steps: int, highest: float) -> float:
    """Linear over the first twentieth, then a cosine down to a tenth."""
    warmup = max(1, steps // 20)
    if step < warmup:
        return highest * (step + 1) / warmup
    return highest * (0.55 + 0.45 * math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


def _batches(text: bytes, count: int, shape: tuple[int, int], seed: int, device: torch.device) -> Callable:
    """Batch number x of `count`, (batch, seq) int64: windows at places that depend on `seed` alone."""
    batch, seq = shape
    if len(text) <= seq:
        raise ValueError(f"the text has {len(text)} bytes; it must have more than seq, {seq}")
    tokens = torch.frombuffer(bytearray(text), dtype=torch.uint8).to(device)
    places = torch.randint(0, len(text) - seq, (count, batch), generator=torch.Generator().manual_seed(seed))
    places = places.to(device)
    within = torch.arange(seq, device=device)
    return lambda x: tokens[places[x][:, None] + within].long()


def _model(precision: str, args: argparse.Namespace, device: torch.device) -> torch.nn.Module:
    models = importlib.import_module("flash_xlstm.models")
    torch.manual_seed(0)
    options = {"num_hidden_layers": args.blocks, "num_heads": args.heads, "weight_mode": "fused"}
    options["autocast_kernel_dtype"] = "float16" if precision == "float16_scaled" else "bfloat16"
    with device:
        model = models.xLSTMForCausalLM(models.xLSTMConfig(256, args.width, **options))
    if precision == "bfloat16":
        model.to(torch.bfloat16)
    if precision == "float8":
        cpu = device.type == "cpu"
        importlib.import_module("flash_xlstm.training").convert_to_float8(model, args.recipe, emulate=cpu)
        if not cpu:
            for block in model.backbone.blocks:
                block.compile(fullgraph=True)
    return model


def _train(row: dict, texts: tuple[bytes, bytes], args: argparse.Namespace) -> None:
    precision, device = row["precision"], torch.device(args.device)
    begin = time.perf_counter()
    model = _model(precision, args, device)
    row["parameters"] = sum(p.numel() for p in model.parameters())
    batch_of = _batches(texts[0], args.steps, args.shape, 0, device)
    held_out_of = _batches(texts[1], args.held_out_batches, args.shape, 1, device)
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.95), weight_decay=0.1, fused=True)
    scaler = torch.amp.GradScaler(device.type, enabled=precision == "float16_scaled")
    dtype = AUTOCAST.get(precision)

    def autocast() -> contextlib.AbstractContextManager:
        return contextlib.nullcontext() if dtype is None else torch.autocast(device.type, dtype)

    def loss_of(ids: Tensor) -> Tensor:
        with autocast():
            return model(input_ids=ids, labels=ids, use_cache=False).loss

    highest = args.learning_rate * (1 + 1e-6 * (precision == "float32_again"))
    losses = torch.zeros(args.steps, device=device)
    model.train()
    for step in range(args.steps):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, args.steps, highest)
        loss = loss_of(batch_of(step))
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad(set_to_none=True)
        losses[step] = loss.detach()
    model.eval()
    with torch.no_grad():
        held_out = torch.stack([loss_of(held_out_of(x)) for x in range(args.held_out_batches)])
    row["held_out_loss"] = held_out.double().mean().item()
    row["seconds"] = time.perf_counter() - begin
    if scaler.is_enabled():
        row["loss_scale"] = scaler.get_scale()
    windows = losses.cpu().split(args.window)
    row["window"], row["train_losses"] = args.window, [round(part.mean().item(), 4) for part in windows]


def run(args: argparse.Namespace) -> Iterator[dict]:
    done = {row["precision"] for row in args.earlier_rows if "held_out_loss" in row}
    texts = read_text(args.text)
    batch, seq = args.shape
    common = {"steps": args.steps, "batch": batch, "seq": seq, "width": args.width, "blocks": args.blocks}
    common["text"] = f"{len(texts[0])} + {len(texts[1])} bytes, {hashlib.sha256(b''.join(texts)).hexdigest()[:12]}"
    tf32 = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    try:
        for precision in args.precisions:
            if precision not in done:
                row = {"what": "precision", "precision": precision, **common}
                yield from measured(row, lambda: _train(row, texts, args), torch.device(args.device))  # noqa: B023
    finally:
        torch.backends.cuda.matmul.allow_tf32 = tf32


def summarize(rows: list[dict]) -> list[dict]:
    """A line a precision, with how far its loss is above float32's; enters that into the rows too."""
    reference = next((r["held_out_loss"] for r in rows if r["precision"] == "float32" and "held_out_loss" in r), None)
    for row in rows:
        if reference is not None and "held_out_loss" in row:
            row["over_float32"] = row["held_out_loss"] / reference - 1
    names = ("precision", "held_out_loss", "over_float32", "loss_scale", "seconds", "error")
    return [{name: row[name] for name in names if name in row} for row in rows]
