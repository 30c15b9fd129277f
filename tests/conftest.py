from __future__ import annotations

import functools
import math

import pytest
import torch


def pytest_addoption(parser):
    text = "examples of each fuzz test, drawn anew at each run (default: a few, the same ones at each run)"
    parser.addoption("--fuzz", type=int, metavar="N", help=text)


_drawn = pytest.StashKey[int]()


def pytest_configure(config):
    config.stash[_drawn] = 0


def pytest_sessionfinish(session):
    if hasattr(session.config, "workeroutput"):  # of pytest-xdist
        session.config.workeroutput["drawn"] = session.config.stash[_drawn]


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node):
    node.config.stash[_drawn] += getattr(node, "workeroutput", {}).get("drawn", 0)


def pytest_terminal_summary(terminalreporter, config):
    if config.stash[_drawn]:
        terminalreporter.write_line(f"fuzz tests drew {config.stash[_drawn]:,} cases")


@pytest.hookimpl(tryfirst=True)  # before -m is looked at
def pytest_collection_modifyitems(items):
    for item in items:
        if "fuzz" in getattr(item, "fixturenames", ()):
            item.add_marker("fuzz")
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
        chosen = hypothesis.settings(
            max_examples=asked or few,
            derandomize=asked is None,
            database=None,
            deadline=None,
            print_blob=asked is not None,
            suppress_health_check=list(hypothesis.HealthCheck),
        )

        def count(test):
            inner = test.hypothesis.inner_test

            @functools.wraps(inner)
            def counted(*args, **kwargs):
                request.config.stash[_drawn] += 1
                return inner(*args, **kwargs)

            test.hypothesis.inner_test = counted
            return chosen(test)

        return count

    return settings


@pytest.fixture
def page_pool():
    """``page_pool(device, slots, heads, dqk, dv, c_dtype)``: a pool (c, n, m), and the bytes that it is cut out of.

    All of it is NaN. A slot is a page of c, n and m in turn, as in a serving engine's cache. Pages are padded
    to multiples of `multiple` bytes. With 4 most slots of c begin at no multiple of 16 bytes.
    """

    def make(device, slots, heads, dqk, dv, c_dtype=torch.float32, multiple=256):
        shapes = ((heads, dqk, dv), c_dtype), ((heads, dqk), torch.float32), ((heads,), torch.float32)
        sizes = [math.prod(shape) * dtype.itemsize for shape, dtype in shapes]
        page = -(-sum(-(-size // 4) * 4 for size in sizes) // multiple) * multiple
        memory = torch.full((slots * page,), 255, dtype=torch.uint8, device=device)
        parts, first = [], 0
        for (shape, dtype), size in zip(shapes, sizes, strict=True):
            typed, strides = memory.view(dtype), torch.empty(shape, device="meta").stride()
            stride, offset = page // dtype.itemsize, first // dtype.itemsize
            parts.append(typed.as_strided((slots, *shape), (stride, *strides), offset))
            first += -(-size // 4) * 4
        return tuple(parts), memory

    return make
