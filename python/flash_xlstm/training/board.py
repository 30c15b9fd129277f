"""TensorBoard's record of a run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from flash_xlstm.training.errors import TrainingError, reason
from flash_xlstm.training.metrics import Row


def check_tensorboard() -> Any:
    """TensorBoard's writer class.

    Raises:
        TrainingError: the package is missing.
    """
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise TrainingError(
            f"`tensorboard` needs the package tensorboard, which cannot be imported ({reason(error)}); "
            'install it with: pip install "flash-xlstm[tensorboard]"'
        ) from error
    return SummaryWriter


class Board:
    """Writes rows of a run's history as scalars.

    Args:
        folder: of the event files.
        step: steps taken. Events of later steps, which a killed run left, are hidden.
    """

    def __init__(self, folder: Path, step: int) -> None:
        writer = check_tensorboard()
        try:
            self._writer = writer(str(folder), purge_step=step + 1 if step else None)
        except OSError as error:
            raise TrainingError(f"cannot write {folder}: {reason(error)}") from error

    def add(self, row: Row) -> None:
        """Writes a row."""
        for name, value in row.items():
            if name != "step":
                self._writer.add_scalar(name, value, int(row["step"]))

    def __enter__(self) -> Board:
        return self

    def __exit__(self, *error: object) -> None:
        self._writer.close()
