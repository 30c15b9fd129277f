"""What an import says where vLLM is not installed."""

from __future__ import annotations

import importlib.util

import pytest

pytestmark = pytest.mark.skipif(importlib.util.find_spec("vllm") is not None, reason="vLLM is installed")


def test_the_import_says_what_is_missing():
    with pytest.raises(ImportError, match=r"serves on vLLM 0.32 to 0.33; install it with: pip install .*\[vllm\]"):
        importlib.import_module("flash_xlstm.integrations.vllm")
