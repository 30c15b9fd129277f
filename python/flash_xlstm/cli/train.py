"""``flash-xlstm train``."""

from __future__ import annotations

import argparse
from dataclasses import fields
from pathlib import Path
from typing import Any

from flash_xlstm.cli import progress
from flash_xlstm.training import ranks
from flash_xlstm.training.checkpoint import newest
from flash_xlstm.training.settings import RunOptions, TrainSettings
from flash_xlstm.training.setup import resume, start


def run(args: argparse.Namespace) -> int:
    """Trains as the command line says."""
    options = _given(RunOptions, args)
    ranks.join(options.get("device", RunOptions.device))
    again = ranks.restarted() and newest(Path(options.get("out", RunOptions.out))) is not None
    begin = resume if "resume" in args or again else start
    progress.run(begin(_given(TrainSettings, args), options))
    ranks.leave()
    return 0


def _given(kind: type, args: argparse.Namespace) -> dict[str, Any]:
    """The fields of a dataclass that were given on the command line."""
    return {field.name: getattr(args, field.name) for field in fields(kind) if field.name in args}
