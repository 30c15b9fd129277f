"""A training run: its parts, its loop, and its saved form."""

from __future__ import annotations

import contextlib
import gc
import math
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from tokenizers import Tokenizer
from torch import nn

from flash_xlstm.models import xLSTMForCausalLM
from flash_xlstm.training import checkpoint, metrics, state
from flash_xlstm.training.board import Board, check_tensorboard
from flash_xlstm.training.data import Batches, Corpus, xz_bits_per_byte
from flash_xlstm.training.errors import TrainingError
from flash_xlstm.training.mfu import flops_per_token, peak_flops
from flash_xlstm.training.ranks import Ranks
from flash_xlstm.training.settings import KEPT, RunOptions, TrainSettings, resolve_dtype
from flash_xlstm.training.shards import ShardBatches, Shards
from flash_xlstm.training.signals import StopSignals


class Progress:
    """Receives the progress of a run. Subclasses override methods, which do nothing here. The context is entered while
    steps are taken."""

    def started(self, trainer: Trainer) -> None:
        """The run begins: its folder is writable, no step was taken."""

    def evaluated(self, row: metrics.Row) -> None:
        """A new run was evaluated before its first step; `row` is the history's first row."""

    def __enter__(self) -> None:
        """The steps begin."""

    def stepped(self, row: metrics.Row | None) -> None:
        """A step was taken; `row` is its row of the history, or None."""

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """The steps ended, or an error was raised."""


@dataclass(frozen=True)
class RunResult:
    """The result of :meth:`Trainer.run`.

    Attributes:
        folder: the last checkpoint.
        ended: "steps": all steps are taken; "time limit" or "signal": the run can be resumed.
    """

    folder: Path
    ended: str


class Trainer:
    """A run: model, data, optimizer and position. :func:`.start` and :func:`.resume` make one.

    Where torch.distributed is initialized, every process makes one and calls :meth:`run`. Each has its rows of every
    batch, so that a run is the same on any number of processes but for rounding. The first writes files and logs.

    Args:
        settings: the settings that decide the final weights. Its paths and model sizes are saved with each checkpoint
            and not used: `corpus` and `model` are.
        options: where and for how long to run. The device is the model's.
        corpus: tokens to train on, and held-out tokens.
        tokenizer: saved with each checkpoint; None for bytes.
        model: float32 weights on the device to train on.

    Attributes:
        step: optimizer steps taken. It determines the position in the data and in the schedule.
        history: a row for each logged step, with columns of :data:`flash_xlstm.training.metrics.COLUMNS`.
        xz: bits per byte of xz on the held-out text.
        ranks: the processes.

    Raises:
        TrainingError: ``batch_size`` is no multiple of the processes, or ``shard`` is for one.
    """

    def __init__(
        self,
        settings: TrainSettings,
        options: RunOptions,
        corpus: Corpus,
        tokenizer: Tokenizer | None,
        model: xLSTMForCausalLM,
    ) -> None:
        self.settings = settings = replace(settings, dtype=resolve_dtype(settings.dtype, model.device))
        self.options = options
        self.corpus = corpus
        self.tokenizer = tokenizer
        self.model = model.train()
        self.out = Path(options.out)
        self.dtype = self._autocast = getattr(torch, settings.dtype)
        self.ranks = ranks = Ranks()
        if settings.batch_size % ranks.size:
            raise TrainingError(
                f"`batch_size` is {settings.batch_size}; it must be a multiple of the {ranks.size} processes"
            )
        if options.shard and ranks.size == 1:
            raise TrainingError("`shard` is for several processes: start them with torchrun")
        order = (settings.sequence_length, settings.batch_size // ranks.size, settings.seed)
        train = corpus.train
        self.batches = ShardBatches(train, *order) if isinstance(train, Shards) else Batches(train, *order)
        self._flops_per_token = flops_per_token(model)
        self.forward: Any = model
        if ranks.size > 1:
            ranks.arrange(model, options.shard, self.dtype, settings.compile)
            self._autocast = torch.float32  # weights are gathered in the dtype of the computation
        elif settings.compile:
            self.forward = torch.compile(model)
        self.optimizer = _optimizer(model, settings)
        self.step = 0
        self.history: list[metrics.Row] = []
        self.xz = xz_bits_per_byte(corpus.held_out_bytes)
        self._interval = _Interval()
        self._signals = StopSignals()
        self._peak = peak_flops(model.device, self.dtype)
        self._board: Board | None = None
        if options.tensorboard:
            check_tensorboard()

    def restore(self, saved: dict[str, Any]) -> None:
        """Loads a state that :func:`.state.check_state` has checked. The model must have its weights already.

        Raises:
            ValueError: the rest of the state does not fit.
        """
        self.step, self.history = saved["step"], saved["history"]
        loaded = state.check_optimizer(saved["optimizer"], self.optimizer, self.step)
        parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        self.optimizer.load_state_dict({**loaded, "state": self.ranks.split(loaded["state"], parameters)})
        try:
            torch.set_rng_state(saved["random"])
            if self.model.device.type == "cuda" and saved["cuda_random"] is not None:
                torch.cuda.set_rng_state(saved["cuda_random"], self.model.device)
        except (RuntimeError, TypeError) as error:
            raise ValueError(f"random or cuda_random is no state of a generator: {error}") from error

    def run(self, progress: Progress | None = None) -> RunResult:
        """Trains until the last step, the time limit or a signal, then saves.

        In the main thread SIGINT and SIGTERM end the run after the current step. A second SIGINT raises
        KeyboardInterrupt at once.

        Args:
            progress: receives the run's progress.

        Raises:
            TrainingError: the loss is not finite, files cannot be written, another process is training into ``out``, or
                ``out`` has a checkpoint that this run did not go on from.
        """
        with checkpoint.opened(self.out, lock=self.ranks.first):
            if self.history:
                checkpoint.check_resumed(self.out, self.step)
            else:
                checkpoint.check_new(self.out)
            return self._run(progress if progress is not None and self.ranks.first else Progress())

    def _run(self, progress: Progress) -> RunResult:
        progress.started(self)
        tensorboard = self.options.tensorboard and self.ranks.first
        board = Board(self.out / "tensorboard", self.step) if tensorboard else contextlib.nullcontext()
        with board as self._board, StopSignals() as signals:
            if not self.history:
                progress.evaluated(self._log(held_out=True))
            self._loop(signals, progress)
            done = self.step == self.settings.steps
            if done and "held_out_bits_per_byte" not in self.history[-1]:
                self._log(held_out=True)
            folder = self.save()
            signals.received = self.ranks.any(signals.received)
        return RunResult(folder, "steps" if done else "signal" if signals.received else "time limit")

    def _loop(self, signals: StopSignals, progress: Progress) -> None:
        limit = math.inf if self.options.time_limit is None else self.options.time_limit
        end = time.monotonic() + limit
        self._interval = _Interval()
        self._signals = signals
        with progress:
            while self.step < self.settings.steps:
                if self.ranks.any(signals.received or time.monotonic() >= end):
                    break
                before = self.step
                self._train_step()
                if self.step > before:
                    self._after_step(progress)

    def seconds_per_step(self) -> float:
        """Measures the seconds of a step by taking steps. Do not run this trainer afterwards."""
        for _ in range(2):
            self._train_step()
        began, steps = time.monotonic(), 0
        while time.monotonic() - began < 2.0 or steps < 3:
            self._train_step()
            self._interval.wait()
            steps += 1
        return (time.monotonic() - began) / steps

    def save(self) -> Path:
        """Writes a checkpoint, the metrics and the loss curve. Returns the checkpoint's folder.

        Raises:
            TrainingError: they could not be written. An older checkpoint is kept.
        """
        if self._interval.steps:
            self._log()
        folder = self.out / f"checkpoint-{self.step}"
        several = self.ranks.size > 1
        weights = self.ranks.whole(self.model.state_dict()) if several else None
        optimizer = self.ranks.whole(self.optimizer.state_dict()) if several else self.optimizer.state_dict()
        if self.ranks.first:
            self._write(weights, optimizer)
        self.ranks.wait()
        return folder

    def _write(self, weights: dict[str, torch.Tensor] | None, optimizer: dict[str, Any]) -> None:
        """Writes a checkpoint, of the model's own weights or of `weights`, the metrics and the loss curve."""
        on_gpu = self.model.device.type == "cuda"
        values = {
            "format": state.FORMAT,
            "step": self.step,
            "settings": asdict(self.settings),
            "options": {name: getattr(self.options, name) for name in KEPT},
            "fingerprint": self.corpus.fingerprint,
            "optimizer": optimizer,
            "random": torch.get_rng_state(),
            "cuda_random": torch.cuda.get_rng_state(self.model.device) if on_gpu else None,
            "history": self.history,
        }
        values["digest"] = state.digest(values)
        checkpoint.save(self.out, self.step, self.model, self.tokenizer, values, weights)
        checkpoint.write_file(self.out / "metrics.csv", metrics.table(self.history))
        checkpoint.write_file(self.out / "loss.png", metrics.loss_curve(self.history, self.xz))
        # Reference cycles hold a figure and its picture of 2 MB. Python by itself collects them only after some 70
        # figures.
        gc.collect()

    def held_out(self) -> float:
        """Bits per byte of the held-out text."""
        settings = self.settings
        return metrics.held_out_bits_per_byte(
            self.model, self.corpus, settings.sequence_length, settings.batch_size, self._autocast
        )

    def _train_step(self) -> None:
        """Takes a step. A signal between two of its batches abandons it, since there may be many (--accumulate)."""
        settings, device, ranks = self.settings, self.model.device, self.ranks
        rate = learning_rate(self.step, settings)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        total: torch.Tensor | float = 0.0
        for part in range(settings.accumulate):
            number = (self.step * settings.accumulate + part) * ranks.size + ranks.rank
            batch = self.batches[number].to(device, non_blocking=True)
            if ranks.size > 1:
                self.forward.set_requires_gradient_sync(part + 1 == settings.accumulate)
            with metrics.autocast(device, self._autocast):
                loss = metrics.cross_entropy(self.forward, batch) / settings.accumulate
            loss.backward()
            total = total + loss.detach()
            if self._signals.received and part + 1 < settings.accumulate and ranks.size == 1:
                self.optimizer.zero_grad()
                return
        self._interval.add_loss(total)
        norm: Any = nn.utils.clip_grad_norm_(self.model.parameters(), settings.clip)
        norm = norm if ranks.size == 1 else norm.full_tensor()
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.step += 1
        self._interval.end_step(norm, rate)

    def _after_step(self, progress: Progress) -> None:
        """Logs, evaluates and saves where this step is due."""
        options, last = self.options, self.step == self.settings.steps
        evaluate = options.eval_every > 0 and self.step % options.eval_every == 0
        row = None
        if evaluate or last or self.step % options.log_every == 0:
            row = self._log(held_out=evaluate or last)
        progress.stepped(row)
        if self.step % options.save_every == 0 and not last:
            self.save()
            self._interval.restart_clock()

    def _log(self, held_out: bool = False) -> metrics.Row:
        """Adds a row to the history."""
        row: metrics.Row = {"step": self.step}
        if self._interval.steps:
            loss, norm, rate, seconds = self._interval.finish()
            loss = self.ranks.mean(loss)
            if not math.isfinite(loss) or not math.isfinite(norm):
                raise TrainingError(
                    f"training diverged: at step {self.step} the loss is {loss:.3g} and the gradient's norm "
                    f"{norm:.3g}; try a lower `learning_rate`"
                )
            settings = self.settings
            tokens = settings.sequence_length * settings.batch_size * settings.accumulate * self._interval.steps
            row["loss"] = loss
            row["bits_per_byte"] = loss / math.log(2) / self.corpus.bytes_per_token
            row["learning_rate"], row["gradient_norm"], row["tokens_per_s"] = rate, norm, tokens / seconds
            if self._peak is not None:
                row["mfu"] = self._flops_per_token * tokens / seconds / self._peak / self.ranks.size
        if held_out:
            row["held_out_bits_per_byte"] = bits = self.held_out()
            if not math.isfinite(bits):
                raise TrainingError(
                    f"training diverged: at step {self.step} the held-out bits per byte are {bits}; try a lower "
                    "`learning_rate`"
                )
        self.history.append(row)
        if self._board is not None:
            self._board.add(row)
        self._interval = _Interval()
        return row


def learning_rate(step: int, settings: TrainSettings) -> float:
    """The learning rate of a step, counted from 0: linear warm-up, then a cosine to the final rate."""
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
    """Sums since the last row of the history. They stay on the device, so that a step does not wait for it."""

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
        """The mean loss, the last gradient norm, the last learning rate, and the seconds since the last row."""
        loss, norm = float(self._loss) / self.steps, float(self._norm)
        return loss, norm, self._rate, time.monotonic() - self._began
