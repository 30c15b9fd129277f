"""``flash-xlstm train``."""

from __future__ import annotations

import argparse
from dataclasses import fields
from typing import Any

from flash_xlstm.cli import progress
from flash_xlstm.training.settings import RunOptions, TrainSettings
from flash_xlstm.training.setup import resume, start


def run(args: argparse.Namespace) -> int:
    """Trains as the command line says."""
    begin = resume if "resume" in args else start
    progress.run(begin(_given(TrainSettings, args), _given(RunOptions, args)))
    return 0


def _given(kind: type, args: argparse.Namespace) -> dict[str, Any]:
    """The fields of a dataclass that were given on the command line."""
    return {field.name: getattr(args, field.name) for field in fields(kind) if field.name in args}
