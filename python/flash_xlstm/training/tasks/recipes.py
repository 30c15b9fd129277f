"""How models are built for each task and trained on it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from flash_xlstm.nn import block_stack
from flash_xlstm.training.tasks.data import TASKS, Task, recall

MODELS = {"1:0": [0, 0], "0:1": [1, 1], "1:1": [0, 1]}  # a 1 for an sLSTM block, a 0 for an mLSTM block


@dataclass(frozen=True)
class Recipe:
    """How a task is trained and tested.

    Attributes:
        task: the task.
        train_lengths: lengths to train on, ascending. A batch has one of them (:meth:`open_lengths`).
        test_lengths: lengths of the sequences to test on.
        embedding_dim, mlstm_heads, slstm_heads: sizes of the models.
        steps, batch_size, learning_rate, weight_decay: of AdamW.
        test_rows: sequences of each length to test on.
        even_tokens: whether a batch of shorter sequences has more rows, so that all batches have as many tokens.
        tie_weights: whether the output layer shares the embedding's weight.
    """

    task: Task
    train_lengths: tuple[int, ...]
    test_lengths: tuple[int, ...]
    embedding_dim: int
    steps: int
    batch_size: int
    learning_rate: float
    test_rows: int = 2048
    weight_decay: float = 0.1
    mlstm_heads: int = 1
    slstm_heads: int = 1
    even_tokens: bool = False
    tie_weights: bool = False

    @property
    def longest(self) -> int:
        """The longest training length."""
        return self.train_lengths[-1]

    def rows(self, length: int) -> int:
        """Sequences of a training batch of that length."""
        return self.batch_size * (self.longest // length if self.even_tokens else 1)

    def open_lengths(self, progress: float) -> tuple[int, ...]:
        """The lengths that batches are drawn from. This curriculum adds one length after another over the first half of
        training, at even intervals.

        Without it a model with an mLSTM block gets stuck in a solution that holds for short prefixes only.

        Args:
            progress: the fraction of training that is done.
        """
        return self.train_lengths[: 1 + int(progress / _RAMP * len(self.train_lengths))]


_RAMP = 0.5


def _tracking(name: str, **sizes: Any) -> Recipe:
    # Every prefix has a target, so training covers all lengths up to 40. Tests use one to six times that.
    return Recipe(TASKS[name], (5, 10, 20, 40), (40, 80, 120, 160, 200, 240), **sizes)


_STATE_TRACKING = [name for name in TASKS if name != "mqar"]
_FULL_SIZES: dict[str, Any] = {"embedding_dim": 64, "steps": 4000, "batch_size": 256, "learning_rate": 5e-3}
_SMALL_SIZES: dict[str, Any] = {"embedding_dim": 32, "steps": 700, "batch_size": 64, "learning_rate": 1e-2}
FULL = {
    **{name: _tracking(name, **_FULL_SIZES) for name in _STATE_TRACKING},
    "mqar": Recipe(
        TASKS["mqar"], (4, 8, 16, 32, 64), (16, 32, 64, 128, 256),
        embedding_dim=128, steps=3000, batch_size=64, learning_rate=2e-3, test_rows=256,
        even_tokens=True, tie_weights=True,
    ),
}  # fmt: skip
SMALL = {
    **{name: _tracking(name, **_SMALL_SIZES, test_rows=512) for name in _STATE_TRACKING},
    "mqar": Recipe(
        recall(64), (2, 4, 8), (4, 8, 16, 24),
        embedding_dim=64, steps=600, batch_size=64, learning_rate=3e-3, test_rows=256,
    ),
}  # fmt: skip


def build(recipe: Recipe, kind: str) -> block_stack.xLSTMLMModel:
    """A model of two blocks, initialized from torch's random state."""
    slstm = block_stack.sLSTMLayerConfig(
        num_heads=recipe.slstm_heads, bias_init="standard", recurrent_weight_init="standard"
    )
    config = block_stack.xLSTMLMModelConfig(
        mlstm_block=block_stack.mLSTMBlockConfig(block_stack.mLSTMLayerConfig(num_heads=recipe.mlstm_heads)),
        slstm_block=block_stack.sLSTMBlockConfig(slstm),
        vocab_size=recipe.task.vocab_size,
        num_blocks=len(MODELS[kind]),
        embedding_dim=recipe.embedding_dim,
        tie_weights=recipe.tie_weights,
        slstm_at=[index for index, is_slstm in enumerate(MODELS[kind]) if is_slstm],
    )
    model = block_stack.xLSTMLMModel(config)
    model.reset_parameters()
    return model
