"""The xLSTM for torchtitan 0.3 (docs/scaling.md)::

    torchrun --nproc-per-node 8 -m torchtitan.train --module flash_xlstm.integrations.torchtitan --config xlstm_7b

torchtitan imports :mod:`.config_registry` of what ``--module`` names. A configuration of one's own is a function in any
module that begins with one of those and changes it; :func:`model_registry` gives models of other sizes.
"""

import re

import torch

try:
    import torchtitan
except ModuleNotFoundError as error:
    raise ImportError('torchtitan is not installed: pip install "flash-xlstm[torchtitan]"') from error

# No ImportError: torchtitan would take one for a module that does not exist, and say so.
if not re.match(r"0\.3\.", torchtitan.__version__):
    raise RuntimeError(
        f"torchtitan is {torchtitan.__version__}; flash_xlstm.integrations.torchtitan needs 0.3 (pip install "
        '"flash-xlstm[torchtitan]"), and torch 2.13 or later'
    )
if tuple(map(int, torch.__version__.split(".")[:2])) < (2, 13):
    raise RuntimeError(f"torch is {torch.__version__}; torchtitan {torchtitan.__version__} needs 2.13 or later")

from flash_xlstm.integrations.torchtitan.model import model_registry

__all__ = ["model_registry"]
