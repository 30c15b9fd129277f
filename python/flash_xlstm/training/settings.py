"""The settings that decide a run's weights, and the options that may differ when it is resumed."""

from __future__ import annotations

import contextlib
import math
import os
from dataclasses import dataclass, fields
from typing import Any

import torch

from flash_xlstm.training.errors import short

KEPT = ("threads", "save_every", "eval_every", "log_every")  # a checkpoint holds these options
MODEL_SIZES = {"hidden_size": "hidden_size", "layers": "num_hidden_layers", "heads": "num_heads"}  # in config.json
PATHS = ("data", "tokenizer", "config")  # paths, which may change: the contents are compared
DTYPES = ("float32", "bfloat16")


@dataclass(frozen=True)
class Number:
    """A range of numbers that a setting accepts.

    Attributes:
        kind: int or float.
        text: the range in words.
        low, high: the bounds.
        above: whether the range excludes `low`.
    """

    kind: type
    text: str
    low: float = 0
    high: float = math.inf
    above: bool = False

    def takes(self, value: object) -> bool:
        """Whether a value is of this kind and in the range."""
        if type(value) is not self.kind:
            return False
        number: Any = value
        return (number > self.low if self.above else number >= self.low) and number <= self.high and number < math.inf


_MOST = 2**63 - 1  # fits a 64-bit counter
POSITIVE_INT = Number(int, "a whole number from 1 to 2^63 - 1", low=1, high=_MOST)
WHOLE_NUMBER = Number(int, "a whole number from 0 to 2^63 - 1", high=_MOST)
THREADS = Number(int, "a whole number from 1 to 1024", low=1, high=1024)
POSITIVE_FLOAT = Number(float, "a number greater than 0", above=True)
NOT_NEGATIVE_FLOAT = Number(float, "a number of at least 0")
FRACTION = Number(float, "a number from 0 to 1", high=1)

NUMBERS = {  # fields of TrainSettings and RunOptions
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
    """The settings that decide a run's final weights. A checkpoint holds them, and a resumed run keeps them.

    Attributes:
        data: a text file, or a folder of them; None: the source of Python's standard library, without its tests.
        tokenizer: a tokenizer.json of the tokenizers library; None: tokens are bytes.
        held_out: bytes at the end of the data to hold out, at most a tenth of it.
        config: a file with an xLSTMConfig as JSON, in place of the next three sizes.
        hidden_size: width of the residual stream.
        layers: number of blocks.
        heads: heads of each block.
        sequence_length: tokens of a training sequence.
        batch_size: sequences of a batch.
        accumulate: batches a step; their gradients are averaged.
        steps: optimizer steps.
        learning_rate: peak learning rate of AdamW.
        final_learning_rate: the last learning rate, as a fraction of the peak.
        warmup: steps of linear warm-up.
        weight_decay: of matrices. Biases and norms have none.
        clip: largest norm of the gradient; a longer one is scaled down.
        seed: of initialization and data order.
        dtype: of the computation, "float32" or "bfloat16". Weights are float32. "auto": bfloat16 on a GPU, else
            float32.
        compile: whether to torch.compile the model.

    Raises:
        ValueError: a value is of another kind, or out of range.
    """

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

    def __post_init__(self) -> None:
        _take(self)


@dataclass(frozen=True)
class RunOptions:
    """Where and for how long to run. Options change the weights at a given step by rounding at most.

    Attributes:
        out: folder for checkpoints, metrics and the loss curve.
        device: "cpu", "cuda" or "cuda:N"; "auto": a GPU if this build has kernels for it.
        threads: CPU threads; None: as many as torch has.
        time_limit: seconds after which to save and stop; None: no limit.
        save_every: steps between checkpoints.
        eval_every: steps between evaluations on held-out data; 0: before the first and after the last step only.
        log_every: steps between points of the loss curve.
        tensorboard: whether to write the history for TensorBoard too, to the folder tensorboard in `out`.
        shard: under torchrun, whether each process keeps a part of weights, gradients and moments (FSDP2), or all.

    Raises:
        ValueError: a value is of another kind, or out of range.
    """

    out: str = "run"
    device: str = "auto"
    threads: int | None = None
    time_limit: float | None = None
    save_every: int = 200
    eval_every: int = 0
    log_every: int = 10
    tensorboard: bool = False
    shard: bool = False

    def __post_init__(self) -> None:
        _take(self)


def check(name: str, value: Any, *, optional: bool, dtypes: tuple[str, ...] = DTYPES) -> None:
    """Checks the value of a field of TrainSettings or RunOptions.

    Args:
        name: of the field.
        value: the value to check.
        optional: whether None is accepted.
        dtypes: the accepted dtypes.

    Raises:
        ValueError: the value is wrong. The text has the field, its value and what it must be.
    """
    if value is None and optional:
        return
    if name in NUMBERS:
        right, text = NUMBERS[name].takes(value), NUMBERS[name].text
    elif name in PATHS or name == "out":
        right, text = type(value) is str and "\0" not in value, "a path"
    elif name == "dtype":
        right, text = type(value) is str and value in dtypes, f"one of: {', '.join(dtypes)}"
    elif name == "device":
        right, text = type(value) is str, "the name of a device"
    else:
        right, text = type(value) is bool, "True or False"
    if not right:
        raise ValueError(f"{name} is {short(value)}; it must be {text}")


def _take(settings: Any) -> None:
    """Checks the fields. Paths become strings and numbers their field's type, so that a checkpoint holds them in one
    form."""
    for field in fields(settings):
        value = getattr(settings, field.name)
        if isinstance(value, os.PathLike):
            value = os.fspath(value)
        elif type(value) is int and field.name in NUMBERS:
            with contextlib.suppress(OverflowError):
                value = NUMBERS[field.name].kind(value)
        check(field.name, value, optional=field.default is None, dtypes=("auto", *DTYPES))
        object.__setattr__(settings, field.name, value)


def resolve_dtype(name: str, device: torch.device) -> str:
    """A setting's dtype, with "auto" resolved for a device."""
    if name != "auto":
        return name
    return "bfloat16" if device.type == "cuda" else "float32"
