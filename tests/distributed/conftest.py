from __future__ import annotations

import inspect
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))  # for the ranks, which import the tests by name

if not torch.distributed.is_available() or not torch.distributed.is_gloo_available():
    pytest.skip("torch has no gloo", allow_module_level=True)


@pytest.fixture
def on_ranks(tmp_path):
    """``on_ranks(world, function, *args)``: what ``function(*args)`` of this file returns on each of `world` processes
    that gloo joins. `on_gpus`: the function uses GPUs."""
    import ranks

    def run(world, function, *args, on_gpus=False):
        return ranks.run(world, tmp_path, Path(inspect.getfile(function)).stem, function.__name__, args, on_gpus)

    return run
