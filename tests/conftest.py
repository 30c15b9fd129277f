from __future__ import annotations

import pytest
import torch


def pytest_addoption(parser):
    text = "examples of each fuzz test, drawn anew at each run (default: a few, the same ones at each run)"
    parser.addoption("--fuzz", type=int, metavar="N", help=text)


def pytest_collection_modifyitems(items):
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs a CUDA GPU; none is visible")
    for item in items:
        if "cuda" in item.keywords:
            item.add_marker(skip)


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.cuda)])
def device(request) -> str:
    """Runs a test on the CPU and on a GPU."""
    return request.param


@pytest.fixture
def fuzz(request):
    """``@fuzz(few)`` above ``@given(...)``: hypothesis draws `few` examples, or as many as --fuzz says.

    For a function inside a test, which then calls it.
    """
    hypothesis = pytest.importorskip("hypothesis")
    asked = request.config.getoption("--fuzz")

    def settings(few: int):
        return hypothesis.settings(
            max_examples=asked or few,
            derandomize=asked is None,
            database=None,
            deadline=None,
            print_blob=asked is not None,
            suppress_health_check=list(hypothesis.HealthCheck),
        )

    return settings
