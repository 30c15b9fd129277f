from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest
import torch

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.fixture(scope="session")
def load_example():
    """Imports an example by its file's name. What it sets of torch's threads is undone at the end."""
    names, threads = [], torch.get_num_threads()

    def load(name):
        spec = importlib.util.spec_from_file_location(f"{name}_example", EXAMPLES / f"{name}.py")
        module = importlib.util.module_from_spec(spec)
        sys.modules[spec.name] = module  # dataclasses need their module in sys.modules
        names.append(spec.name)
        spec.loader.exec_module(module)
        return module

    yield load
    torch.set_num_threads(threads)
    for name in names:
        sys.modules.pop(name, None)
