"""Tensor and pipeline parallel over two processes."""

from __future__ import annotations

import pytest

pytest.importorskip("vllm", reason="vLLM has an environment of its own: make test-vllm")

TENSOR = {"tensor_parallel_size": 2}
# Compiled: eager workers of vLLM's CPU backend do not make the buffers for a stage's input.
PIPELINE = {"pipeline_parallel_size": 2, "enforce_eager": False}


@pytest.mark.parametrize(
    ("ranks", "options"),
    [
        pytest.param(TENSOR, {}, id="tensor"),
        pytest.param(PIPELINE, {"tie_word_embeddings": True}, id="pipeline, tied"),
    ],
)
def test_two_ranks(served, tmp_path, monkeypatch, ranks, options):
    """With tensor parallel each rank has one head, and c, n, m are not a multiple of 16 bytes without padding."""
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "nobind")
    model = served.make_checkpoint(tmp_path, num_heads=2, **options)
    asked = served.prompts(1, 1, 2, 16, 17, 33, 100, 300)
    with served.engine_of(tmp_path, max_num_batched_tokens=64, max_num_seqs=8, **ranks) as engine:
        assert engine.tokens(asked, 24) == served.continuations_of(model, asked, 24)
