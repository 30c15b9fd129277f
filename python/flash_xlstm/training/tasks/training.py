"""Training and testing of a model on a task. On a GPU an optimizer step is replayed from a CUDA graph: launches bound
the speed of models this small."""

from __future__ import annotations

import contextlib
import math
import time
import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from flash_xlstm.nn import block_stack
from flash_xlstm.training.errors import TrainingError
from flash_xlstm.training.metrics import autocast
from flash_xlstm.training.tasks.data import IGNORED
from flash_xlstm.training.tasks.recipes import Recipe

_CLIP = 1.0
_WARMUP = 0.05  # of the steps
_COOLDOWN = 0.2  # of the steps
_SOLVED = 0.999  # accuracy at the longest length
_SOLVED_TIMES = 3  # evaluations in a row
_EVALUATIONS = 40  # in a full training
_EVALUATION_ROWS = 256
_CHECK_EVERY = 10  # steps from one reading of the loss to the next; a reading waits for the device
_CHUNK = 16  # batches drawn at once
_EAGER_STEPS = 3  # eager steps of a shape before its capture


@dataclass(frozen=True)
class Trained:
    """The result of a training.

    Attributes:
        steps: optimizer steps taken.
        loss: mean of the last tenth of a full training's steps, in nats.
        stopped: "steps": all steps were taken; "solved": accuracy stayed high; "seconds": the time ran out.
        cuda_graphs: whether steps were replayed from CUDA graphs.
    """

    steps: int
    loss: float
    stopped: str
    cuda_graphs: bool


def train(
    model: block_stack.xLSTMLMModel,
    recipe: Recipe,
    steps: int,
    generator: torch.Generator,
    dtype: torch.dtype,
    title: str,
    *,
    seconds: float = math.inf,
    cuda_graphs: bool = True,
    stepped: Callable[[float | None], None] = lambda loss: None,
) -> Trained:
    """Trains a model: linear warm-up, a constant rate, and a linear cool-down.

    The cool-down begins early once accuracy on new sequences of the longest length stays at 99.9 percent or more.

    Args:
        model: on the generator's device.
        recipe: how to train; its number of steps is ignored.
        steps: most optimizer steps.
        generator: of the data.
        dtype: to compute in.
        title: of the training, for errors.
        seconds: time limit. Where steps are too slow for it, the schedule follows the clock.
        cuda_graphs: whether CUDA graphs may be used.
        stepped: is called after each step, with the loss in nats where it was read, else None.

    Raises:
        TrainingError: the loss is not finite.
    """
    device, seed = generator.device, generator.initial_seed()
    lengths, held_out = torch.Generator().manual_seed(seed), torch.Generator(device).manual_seed(seed + 1)
    batches, step = _Batches(recipe, generator), _Step(model, recipe, device, dtype, cuda_graphs)
    warmup, cooldown, tail = max(1, round(_WARMUP * steps)), round(_COOLDOWN * steps), max(1, steps // 10)
    evaluate_every, rows = max(1, steps // _EVALUATIONS), min(_EVALUATION_ROWS, recipe.test_rows)
    position = taken = solved = summed = 0  # `position` is the schedule's; it may run ahead of `taken`
    total, stopped, began = torch.zeros((), device=device), "steps", time.monotonic()
    with step.stream():
        while position < steps:
            choices = recipe.open_lengths(position / steps)
            length = choices[int(torch.randint(len(choices), (), generator=lengths))]
            rate = recipe.learning_rate * min(1, (position + 1) / warmup, (steps - position) / max(1, cooldown))
            loss = step(*batches.draw(length), rate)
            if position >= steps - tail:
                total, summed = total + loss, summed + 1
            position, taken = position + 1, taken + 1
            value = None
            if taken % _CHECK_EVERY == 1 or position >= steps:
                value = float(loss)
                if not math.isfinite(value):
                    raise TrainingError(f"training of {title} diverged at step {taken - 1}: the loss is {value:.3g}")
                by_time = int((time.monotonic() - began) / seconds * steps)
                if by_time > position:
                    position, stopped = by_time, "seconds"
            if taken % evaluate_every == 0 and position < steps - cooldown:
                right = accuracy(model, recipe, recipe.longest, held_out, dtype, rows)
                solved = solved + 1 if right >= _SOLVED else 0
                if solved == _SOLVED_TIMES:
                    position, stopped = steps - cooldown, "solved"
            stepped(value)
    mean = float(total) / summed if summed else float(loss)
    return Trained(taken, mean, stopped, step.uses_graphs)


class _Batches:
    """Batches of a task. Several are drawn at once, because a draw is many small launches."""

    def __init__(self, recipe: Recipe, generator: torch.Generator) -> None:
        self.recipe, self.generator = recipe, generator
        self.drawn: dict[int, list[tuple[Tensor, Tensor]]] = {}

    def draw(self, length: int) -> tuple[Tensor, Tensor]:
        """Tokens and targets, (batch, seq) int64."""
        if not self.drawn.get(length):
            rows = self.recipe.rows(length)
            sequences = self.recipe.task.sample(length, rows * _CHUNK, self.generator)
            self.drawn[length] = list(zip(*(t.split(rows) for t in sequences), strict=True))
        return self.drawn[length].pop()


class _Step:
    """An optimizer step. On CUDA the first few steps of each shape are eager, so that initialization precedes capture.
    Later steps are replayed from a CUDA graph. All steps are eager after a failed capture.

    Call it within :meth:`stream`.
    """

    def __init__(
        self,
        model: block_stack.xLSTMLMModel,
        recipe: Recipe,
        device: torch.device,
        dtype: torch.dtype,
        cuda_graphs: bool,
    ) -> None:
        self.model, self.device, self.dtype = model, device, dtype
        self.uses_graphs = cuda_graphs and device.type == "cuda"
        decay, rest = model.get_weight_decay_optim_groups()
        self.optimizer = torch.optim.AdamW(
            [{"params": decay, "weight_decay": recipe.weight_decay}, {"params": rest, "weight_decay": 0.0}],
            lr=torch.tensor(recipe.learning_rate, device=device),  # a tensor, which each replay of a graph reads again
            betas=(0.9, 0.95),
            fused=True,
            capturable=self.uses_graphs,
        )
        self._seen: Counter[torch.Size] = Counter()
        self._captured: dict[torch.Size, tuple[torch.cuda.CUDAGraph, Tensor, Tensor, Tensor]] = {}

    @contextlib.contextmanager
    def stream(self) -> Any:
        """A side stream, which capture needs. The current stream waits for it at the end."""
        if not self.uses_graphs:
            yield
            return
        outer, side = torch.cuda.current_stream(self.device), torch.cuda.Stream(self.device)
        side.wait_stream(outer)
        with torch.cuda.stream(side):
            yield
        outer.wait_stream(side)

    def __call__(self, tokens: Tensor, targets: Tensor, rate: float) -> Tensor:
        """Takes a step. Returns the loss before it, in nats, as a tensor that a later call may overwrite."""
        for group in self.optimizer.param_groups:
            group["lr"].fill_(rate)
        shape = tokens.shape
        self._seen[shape] += 1
        if self.uses_graphs and self._seen[shape] > _EAGER_STEPS and shape not in self._captured:
            self._capture(tokens, targets)
        if not self.uses_graphs or shape not in self._captured:
            return self._run(tokens, targets)
        graph, static_tokens, static_targets, loss = self._captured[shape]
        static_tokens.copy_(tokens)
        static_targets.copy_(targets)
        graph.replay()
        return loss

    def _run(self, tokens: Tensor, targets: Tensor) -> Tensor:
        self.model.train()
        with autocast(self.device, self.dtype):
            logits = self.model(tokens)
        loss = F.cross_entropy(logits.float().flatten(0, 1), targets.flatten(), ignore_index=IGNORED)
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), _CLIP)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss.detach()

    def _capture(self, tokens: Tensor, targets: Tensor) -> None:
        graph, inputs = torch.cuda.CUDAGraph(), (tokens.clone(), targets.clone())
        torch.cuda.synchronize(self.device)
        try:
            with torch.cuda.graph(graph):
                loss = self._run(*inputs)
        except RuntimeError as error:
            warnings.warn(f"no CUDA graph of a step, so steps are slower: {error}", stacklevel=2)
            self.uses_graphs = False
            self.optimizer.zero_grad()
        else:
            self._captured[tokens.shape] = (graph, *inputs, loss)


@torch.no_grad()
def accuracy(
    model: block_stack.xLSTMLMModel,
    recipe: Recipe,
    length: int,
    generator: torch.Generator,
    dtype: torch.dtype,
    rows: int | None = None,
) -> float:
    """The fraction of right answers on `rows` new sequences of a length; default: the recipe's number of rows."""
    model.eval()
    rows, right, asked = rows or recipe.test_rows, 0, 0
    for start in range(0, rows, recipe.batch_size):
        tokens, targets = recipe.task.sample(length, min(recipe.batch_size, rows - start), generator)
        with autocast(generator.device, dtype):
            answers = model(tokens).argmax(-1)
        if recipe.task.last_only:
            answers, targets = answers[:, -1:], targets[:, -1:]
        right += int((answers == targets)[targets != IGNORED].sum())
        asked += int((targets != IGNORED).sum())
    return right / asked
