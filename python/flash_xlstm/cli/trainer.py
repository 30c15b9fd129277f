"""One training run: what it consists of, its loop, and its saved form."""

from __future__ import annotations

import gc
import math
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from torch import nn
from tqdm import tqdm

from flash_xlstm.cli import checkpoint, metrics, state
from flash_xlstm.cli.data import Batches, Corpus, xz_bits_per_byte
from flash_xlstm.cli.errors import CommandError, Interrupted
from flash_xlstm.cli.settings import KEPT, RunOptions, TrainSettings
from flash_xlstm.cli.signals import StopSignals
from flash_xlstm.models import xLSTMForCausalLM


class Trainer:
    """A run: the model, what it is trained with, and how far it is.

    Attributes:
        step: optimizer steps done. The position in the data and in the schedule are functions of it.
        history: one row a logged step; see :data:`flash_xlstm.cli.metrics.COLUMNS`.
        xz: bits per byte of xz on the held-out text.
    """

    def __init__(
        self,
        settings: TrainSettings,
        options: RunOptions,
        corpus: Corpus,
        tokenizer: Tokenizer | None,
        model: xLSTMForCausalLM,
    ) -> None:
        self.settings = settings
        self.options = options
        self.corpus = corpus
        self.tokenizer = tokenizer
        self.model = model.train()
        self.out = Path(options.out)
        self.dtype = getattr(torch, settings.dtype)
        self.batches = Batches(corpus.train, settings.sequence_length, settings.batch_size, settings.seed)
        self.optimizer = _optimizer(model, settings)
        self.forward: Any = torch.compile(model) if settings.compile else model
        self.step = 0
        self.history: list[metrics.Row] = []
        self.xz = xz_bits_per_byte(corpus.held_out_bytes)
        self._interval = _Interval()
        self._signals = StopSignals()

    def restore(self, saved: dict[str, Any]) -> None:
        """Takes up a state that :func:`.state.check_state` has checked; the model has its weights already.

        Raises:
            ValueError: the rest of the state does not fit.
        """
        self.step, self.history = saved["step"], saved["history"]
        self.optimizer.load_state_dict(state.check_optimizer(saved["optimizer"], self.optimizer, self.step))
        try:
            torch.set_rng_state(saved["random"])
            if self.model.device.type == "cuda" and saved["cuda_random"] is not None:
                torch.cuda.set_rng_state(saved["cuda_random"], self.model.device)
        except (RuntimeError, TypeError) as error:
            raise ValueError(f"random or cuda_random is no state of a generator: {error}") from error

    def run(self) -> None:
        """Trains until the last step, the time limit or a signal, and saves."""
        checkpoint.open_run(self.out)
        self._describe()
        with StopSignals() as signals:
            if not self.history:
                bits = self._log(held_out=True)["held_out_bits_per_byte"]
                print(f"held-out bits per byte: {bits:.3f}; xz -9e: {self.xz:.3f}", flush=True)
            self._loop(signals)
            done = self.step == self.settings.steps
            if done and "held_out_bits_per_byte" not in self.history[-1]:
                self._log(held_out=True)
            folder = self.save()
        if signals.received and not done:
            raise Interrupted(f"step {self.step} of {self.settings.steps} is saved in {folder}; --resume goes on")
        self._report(folder, done)

    def _loop(self, signals: StopSignals) -> None:
        limit = math.inf if self.options.time_limit is None else self.options.time_limit
        end = time.monotonic() + limit
        self._interval = _Interval()
        self._signals = signals
        with self._bar() as bar:
            while self.step < self.settings.steps and not signals.received and time.monotonic() < end:
                before = self.step
                self._train_step()
                if self.step > before:
                    self._after_step(bar)

    def seconds_per_step(self) -> float:
        """Measures the speed of training, by training; the run is spoilt by it."""
        for _ in range(2):
            self._train_step()
        began, steps = time.monotonic(), 0
        while time.monotonic() - began < 2.0 or steps < 3:
            self._train_step()
            self._interval.wait()
            steps += 1
        return (time.monotonic() - began) / steps

    def save(self) -> Path:
        """Writes a checkpoint, and beside it the metrics and the loss curve."""
        if self._interval.steps:
            self._log()
        on_gpu = self.model.device.type == "cuda"
        values = {
            "format": state.FORMAT,
            "step": self.step,
            "settings": asdict(self.settings),
            "options": {name: getattr(self.options, name) for name in KEPT},
            "fingerprint": self.corpus.fingerprint,
            "optimizer": self.optimizer.state_dict(),
            "random": torch.get_rng_state(),
            "cuda_random": torch.cuda.get_rng_state(self.model.device) if on_gpu else None,
            "history": self.history,
        }
        values["digest"] = state.digest(values)
        folder = checkpoint.save(self.out, self.step, self.model, self.tokenizer, values)
        checkpoint.write_file(self.out / "metrics.csv", metrics.table(self.history))
        checkpoint.write_file(self.out / "loss.png", metrics.loss_curve(self.history, self.xz))
        # A figure, with its picture of 2 MB, is held by cycles, which Python looks for only once a quarter as many
        # objects are new as are old: after some 70 figures.
        gc.collect()
        return folder

    def held_out(self) -> float:
        """Bits per byte of the held-out text."""
        settings = self.settings
        return metrics.held_out_bits_per_byte(
            self.model, self.corpus, settings.sequence_length, settings.batch_size, self.dtype
        )

    def _train_step(self) -> None:
        """Takes a step, unless a signal comes in between two batches of it: --accumulate may be large."""
        settings, device = self.settings, self.model.device
        rate = learning_rate(self.step, settings)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        total: torch.Tensor | float = 0.0
        for part in range(settings.accumulate):
            batch = self.batches[self.step * settings.accumulate + part].to(device, non_blocking=True)
            with metrics.autocast(device, self.dtype):
                loss = metrics.cross_entropy(self.forward, batch) / settings.accumulate
            loss.backward()
            total = total + loss.detach()
            if self._signals.received and part + 1 < settings.accumulate:
                self.optimizer.zero_grad()
                return
        self._interval.add_loss(total)
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), settings.clip)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.step += 1
        self._interval.end_step(norm, rate)

    def _after_step(self, bar: tqdm) -> None:
        """What comes due at this step: a point of the curve, an evaluation, a checkpoint."""
        options, last = self.options, self.step == self.settings.steps
        evaluate = options.eval_every > 0 and self.step % options.eval_every == 0
        if evaluate or last or self.step % options.log_every == 0:
            row = self._log(held_out=evaluate or last)
            bar.set_postfix_str(
                f"loss {row['loss']:.3f}, {row['bits_per_byte']:.3f} bits/byte, {row['tokens_per_s']:,.0f} tokens/s",
                refresh=False,
            )
        bar.update()
        if self.step % options.save_every == 0 and not last:
            self.save()
            self._interval.restart_clock()

    def _log(self, held_out: bool = False) -> metrics.Row:
        """Adds a row to the history."""
        row: metrics.Row = {"step": self.step}
        if self._interval.steps:
            loss, norm, rate, seconds = self._interval.finish()
            if not math.isfinite(loss) or not math.isfinite(norm):
                raise CommandError(
                    f"training diverged: at step {self.step} the loss is {loss:.3g} and the gradient's norm "
                    f"{norm:.3g}; try a lower --learning-rate"
                )
            settings = self.settings
            tokens = settings.sequence_length * settings.batch_size * settings.accumulate * self._interval.steps
            row["loss"] = loss
            row["bits_per_byte"] = loss / math.log(2) / self.corpus.bytes_per_token
            row["learning_rate"], row["gradient_norm"], row["tokens_per_s"] = rate, norm, tokens / seconds
        if held_out:
            row["held_out_bits_per_byte"] = bits = self.held_out()
            if not math.isfinite(bits):
                raise CommandError(
                    f"training diverged: at step {self.step} the held-out bits per byte are {bits}; try a lower "
                    "--learning-rate"
                )
        self.history.append(row)
        self._interval = _Interval()
        return row

    def _bar(self) -> tqdm:
        interval = 0.1 if sys.stderr.isatty() else 10.0
        steps = self.settings.steps
        return tqdm(
            total=steps, initial=self.step, unit="step", desc="training", dynamic_ncols=True, mininterval=interval
        )

    def _describe(self) -> None:
        size = sum(p.numel() for p in self.model.parameters())
        print(
            f"{size:,} parameters on {self.model.device} in {self.settings.dtype}; "
            f"{len(self.corpus.train):,} tokens to train on, {len(self.corpus.held_out_bytes):,} bytes held out; "
            f"{'resuming at' if self.step else 'starting at'} step {self.step} of {self.settings.steps}",
            flush=True,
        )

    def _report(self, folder: Path, done: bool) -> None:
        if done:
            bits = [row["held_out_bits_per_byte"] for row in self.history if "held_out_bits_per_byte" in row]
            print(f"held-out bits per byte: {bits[0]:.3f} at the start, {bits[-1]:.3f} now; xz -9e: {self.xz:.3f}")
        else:
            print(f"time limit: stopped at step {self.step} of {self.settings.steps}; --resume goes on")
        print(f"checkpoint: {folder}\nloss curve: {self.out / 'loss.png'}")


def learning_rate(step: int, settings: TrainSettings) -> float:
    """Linear warm-up, then a cosine to the final rate; `step` counts from 0."""
    if step < settings.warmup:
        return settings.learning_rate * (step + 1) / settings.warmup
    progress = (step - settings.warmup) / max(1, settings.steps - settings.warmup)
    low = settings.final_learning_rate
    return settings.learning_rate * (low + (1 - low) * (1 + math.cos(math.pi * min(progress, 1.0))) / 2)


def _optimizer(model: xLSTMForCausalLM, settings: TrainSettings) -> torch.optim.AdamW:
    parameters = list(model.parameters())
    groups = [
        {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": settings.weight_decay},
        {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=settings.learning_rate, betas=(0.9, 0.95), fused=True)


class _Interval:
    """Sums since the last row of the history. They stay on the device, so that a step need not wait for it."""

    def __init__(self) -> None:
        self.steps = 0
        self._loss: torch.Tensor | float = 0.0
        self._norm: torch.Tensor | float = 0.0
        self._rate = 0.0
        self.restart_clock()

    def restart_clock(self) -> None:
        self._began = time.monotonic()

    def add_loss(self, loss: torch.Tensor | float) -> None:
        self._loss = self._loss + loss

    def end_step(self, norm: torch.Tensor, rate: float) -> None:
        self.steps += 1
        self._norm = norm
        self._rate = rate

    def wait(self) -> None:
        """Waits for the device."""
        float(self._norm)

    def finish(self) -> tuple[float, float, float, float]:
        """The mean loss, the last gradient norm and learning rate, and the seconds passed."""
        loss, norm = float(self._loss) / self.steps, float(self._norm)
        return loss, norm, self._rate, time.monotonic() - self._began
