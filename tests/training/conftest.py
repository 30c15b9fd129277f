"""Fixtures of tiny training runs."""

from __future__ import annotations

import pytest
import torch

for _package in ("transformers", "tokenizers", "matplotlib"):
    pytest.importorskip(_package)


@pytest.fixture(autouse=True)
def one_thread():
    """More threads do not speed up models this small, and threads that wait for a busy core are slow."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def text(tmp_path):
    """A file of 20,000 bytes of text that is easy to learn."""
    path = tmp_path / "text.txt"
    path.write_text("".join(f"{n}: the quick brown fox jumps over {n % 7} lazy dogs\n" for n in range(1000))[:20000])
    return path
