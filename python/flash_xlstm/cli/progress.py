"""A training run on the terminal."""

from __future__ import annotations

import sys
from types import TracebackType

from tqdm import tqdm

from flash_xlstm.cli.errors import Interrupted
from flash_xlstm.training.metrics import Row
from flash_xlstm.training.trainer import Progress, Trainer


def run(trainer: Trainer) -> None:
    """Runs a trainer, and prints how it begins, goes and ends.

    Raises:
        Interrupted: a signal ended it before its last step.
    """
    result = trainer.run(_Terminal())
    step, steps = trainer.step, trainer.settings.steps
    if result.ended == "signal":
        raise Interrupted(f"step {step} of {steps} is saved in {result.folder}; --resume goes on")
    if not trainer.ranks.first:
        return
    if result.ended == "steps":
        bits = [row["held_out_bits_per_byte"] for row in trainer.history if "held_out_bits_per_byte" in row]
        print(f"held-out bits per byte: {bits[0]:.3f} at the start, {bits[-1]:.3f} now; xz -9e: {trainer.xz:.3f}")
    else:
        print(f"time limit: stopped at step {step} of {steps}; --resume goes on")
    print(f"checkpoint: {result.folder}\nloss curve: {trainer.out / 'loss.png'}")


class _Terminal(Progress):
    """Lines on stdout, and a bar on stderr while steps are taken."""

    def started(self, trainer: Trainer) -> None:
        self.trainer = trainer
        size = sum(p.numel() for p in trainer.model.parameters())
        corpus, step = trainer.corpus, trainer.step
        print(
            f"{size:,} parameters on {trainer.model.device} in {trainer.settings.dtype}; "
            f"{len(corpus.train):,} tokens to train on, {len(corpus.held_out_bytes):,} bytes held out; "
            f"{'resuming at' if step else 'starting at'} step {step} of {trainer.settings.steps}",
            flush=True,
        )

    def evaluated(self, row: Row) -> None:
        bits = row["held_out_bits_per_byte"]
        print(f"held-out bits per byte: {bits:.3f}; xz -9e: {self.trainer.xz:.3f}", flush=True)

    def __enter__(self) -> None:
        self.bar = tqdm(
            total=self.trainer.settings.steps,
            initial=self.trainer.step,
            unit="step",
            desc="training",
            dynamic_ncols=True,
            mininterval=0.1 if sys.stderr.isatty() else 10.0,
        )

    def stepped(self, row: Row | None) -> None:
        if row is not None:
            speed = f"{row['tokens_per_s']:,.0f} tokens/s" + (f", {row['mfu']:.1%} MFU" if "mfu" in row else "")
            self.bar.set_postfix_str(
                f"loss {row['loss']:.3f}, {row['bits_per_byte']:.3f} bits/byte, {speed}", refresh=False
            )
        self.bar.update()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.bar.close()
