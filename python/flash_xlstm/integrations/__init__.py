"""Other libraries' models, trainers and servers on this package's kernels."""

from typing import TYPE_CHECKING

from flash_xlstm._lazy import attach

if TYPE_CHECKING:
    from flash_xlstm.integrations.drop_in import accelerate as accelerate
    from flash_xlstm.integrations.drop_in import undo as undo

__getattr__, __dir__ = attach(__name__, dict.fromkeys(("accelerate", "undo"), "flash_xlstm.integrations.drop_in"))
