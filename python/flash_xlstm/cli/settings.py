"""What decides the course of a training run, and what may differ when it is resumed."""

from __future__ import annotations

from dataclasses import dataclass, fields

KEPT = ("threads", "save_every", "eval_every", "log_every")  # by a checkpoint, though free to change
MODEL_SIZES = ("hidden_size", "layers", "heads")
PATHS = ("data", "tokenizer", "config")  # may have moved: what is compared is what they hold


@dataclass(frozen=True)
class TrainSettings:
    """Everything that decides what weights a run ends with. A checkpoint holds it, and resuming keeps to it."""

    data: str | None = None
    tokenizer: str | None = None
    held_out: int = 262144
    config: str | None = None
    hidden_size: int = 256
    layers: int = 4
    heads: int = 4
    sequence_length: int = 512
    batch_size: int = 16
    accumulate: int = 1
    steps: int = 1000
    learning_rate: float = 2e-3
    final_learning_rate: float = 0.05
    warmup: int = 50
    weight_decay: float = 0.1
    clip: float = 1.0
    seed: int = 0
    dtype: str = "auto"
    compile: bool = False


@dataclass(frozen=True)
class RunOptions:
    """Where and for how long to run; it changes the weights at a given step by no more than rounding."""

    out: str = "run"
    resume: bool = False
    device: str = "auto"
    threads: int | None = None
    time_limit: float | None = None
    save_every: int = 200
    eval_every: int = 0
    log_every: int = 10


def flag(name: str) -> str:
    """A setting's name as it is on the command line."""
    return "--" + name.replace("_", "-")


def pick(kind: type, values: dict) -> dict:
    """Those of the values that are fields of a dataclass."""
    names = {field.name for field in fields(kind)}
    return {name: value for name, value in values.items() if name in names}
