"""What decides the course of a training run, and what may differ when it is resumed."""

from __future__ import annotations

import argparse
import math
from dataclasses import dataclass, fields
from typing import Any

KEPT = ("threads", "save_every", "eval_every", "log_every")  # by a checkpoint, though free to change
MODEL_SIZES = {"hidden_size": "hidden_size", "layers": "num_hidden_layers", "heads": "num_heads"}  # in config.json
PATHS = ("data", "tokenizer", "config")  # may have moved: what is compared is what they hold
DTYPES = ("float32", "bfloat16")


@dataclass(frozen=True)
class Number:
    """The numbers that an option takes; as the type of an argparse option it reads them.

    Attributes:
        kind: int or float.
        text: in words.
        low, high: the smallest and the largest of them.
        above: whether `low` is none of them.
    """

    kind: type
    text: str
    low: float = 0
    high: float = math.inf
    above: bool = False

    def takes(self, value: object) -> bool:
        """Whether a value is of this kind and in range."""
        if type(value) is not self.kind:
            return False
        number: Any = value
        return (number > self.low if self.above else number >= self.low) and number <= self.high and number < math.inf

    def __call__(self, text: str) -> Any:
        try:
            value = self.kind(text)
        except ValueError:
            value = None
        if not self.takes(value):
            raise argparse.ArgumentTypeError(f"{text!r} is not {self.text}")
        return value


_MOST = 2**63 - 1  # what a 64-bit counter holds
POSITIVE_INT = Number(int, "a whole number from 1 to 2^63 - 1", low=1, high=_MOST)
WHOLE_NUMBER = Number(int, "a whole number from 0 to 2^63 - 1", high=_MOST)
THREADS = Number(int, "a whole number from 1 to 1024", low=1, high=1024)
POSITIVE_FLOAT = Number(float, "a number greater than 0", above=True)
NOT_NEGATIVE_FLOAT = Number(float, "a number of at least 0")
FRACTION = Number(float, "a number from 0 to 1", high=1)

NUMBERS = {  # of TrainSettings and RunOptions
    "held_out": POSITIVE_INT,
    "hidden_size": POSITIVE_INT,
    "layers": POSITIVE_INT,
    "heads": POSITIVE_INT,
    "sequence_length": POSITIVE_INT,
    "batch_size": POSITIVE_INT,
    "accumulate": POSITIVE_INT,
    "steps": POSITIVE_INT,
    "learning_rate": POSITIVE_FLOAT,
    "final_learning_rate": FRACTION,
    "warmup": WHOLE_NUMBER,
    "weight_decay": NOT_NEGATIVE_FLOAT,
    "clip": POSITIVE_FLOAT,
    "seed": WHOLE_NUMBER,
    "threads": THREADS,
    "time_limit": POSITIVE_FLOAT,
    "save_every": POSITIVE_INT,
    "eval_every": WHOLE_NUMBER,
    "log_every": POSITIVE_INT,
}


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
