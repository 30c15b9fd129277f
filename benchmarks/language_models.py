"""Whole models of one configuration with random weights, ours and the peers', to measure forward passes.

transformers' own xLSTM runs its native kernels; NX-AI's xlstm_large runs mlstm_kernels' Triton kernels.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import importlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

MODELS = ("flash_xlstm", "transformers", "xlstm_large")
# vocabulary, width, blocks, heads
SIZES = {
    "7b": (50304, 4096, 32, 8),
    "134m": (32000, 768, 12, 4),  # 110 million without the embedding table, of which a step reads one row
    "101m": (32000, 640, 12, 5),
    "110m_deep": (32000, 512, 24, 4),
    "tiny": (256, 128, 2, 2),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--size", choices=SIZES, default="7b" if torch.cuda.is_available() else "134m")
    parser.add_argument("--models", nargs="+", choices=MODELS, default=MODELS)
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument("--threads", type=int, help="CPU threads; default: torch's")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")


def with_float32_gates(model: nn.Module) -> None:
    """Gives mlstm_kernels' backends in `model` gates in float32: where those of triton_xl_chunk have 16 bits, Triton
    3.6 ends the process in an assertion. Autocast, which would cast them within, is off there."""

    def call(forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        gates = {name: kwargs[name].float() for name in ("i", "f")}
        with torch.autocast("cuda", enabled=False):
            return forward(*args, **{**kwargs, **gates})

    for module in model.modules():
        if type(module).__name__ == "mLSTMBackend":
            module.forward = functools.partial(call, module.forward)  # type: ignore[method-assign]


@dataclass
class LanguageModel:
    """`prefill(ids)` reads a prompt and returns a state. `step(token, state)` reads a token (batch, 1), advances the
    state in place and returns the logits. Both run without gradients."""

    module: torch.nn.Module
    prefill: Callable[[Tensor], Any]
    step: Callable[[Tensor, Any], Tensor]


@contextlib.contextmanager
def made_on(device: torch.device, dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with device:
            yield
    finally:
        torch.set_default_dtype(before)


def _ours(size: str) -> LanguageModel:
    models = importlib.import_module("flash_xlstm.models")
    vocabulary, width, blocks, heads = SIZES[size]
    config = models.xLSTMConfig(vocabulary, width, num_hidden_layers=blocks, num_heads=heads, weight_mode="fused")
    return _hugging_face(models.xLSTMForCausalLM(config))


def _transformers(size: str) -> LanguageModel:
    peer = importlib.import_module("transformers.models.xlstm.modeling_xlstm")
    if peer.external_xlstm:
        raise RuntimeError("transformers uses the installed xlstm package; uninstall it to measure the native kernels")
    vocabulary, width, blocks, heads = SIZES[size]
    config = peer.xLSTMConfig(vocab_size=vocabulary, hidden_size=width, num_hidden_layers=blocks, num_heads=heads)
    return _hugging_face(peer.xLSTMForCausalLM(config))


def _hugging_face(model: Any) -> LanguageModel:
    last = {"logits_to_keep": 1} if type(model).__module__.startswith("flash_xlstm") else {}

    def prefill(ids: Tensor) -> Any:
        return model(ids, use_cache=True, **last).cache_params

    def step(token: Tensor, state: Any) -> Tensor:
        return model(token, use_cache=True, cache_params=state).logits

    return LanguageModel(model, prefill, step)


def _xlstm_large(size: str) -> LanguageModel:
    package = importlib.import_module("xlstm.xlstm_large.model")
    vocabulary, width, blocks, heads = SIZES[size]
    config = package.xLSTMLargeConfig(
        embedding_dim=width,
        num_heads=heads,
        num_blocks=blocks,
        vocab_size=vocabulary,
        return_last_states=True,
        mode="inference",
        chunkwise_kernel="chunkwise--triton_xl_chunk",
        sequence_kernel="native_sequence__triton",
        step_kernel="triton",
        weight_mode="fused",
    )
    model = package.xLSTMLarge(config)
    return LanguageModel(model, lambda ids: model(ids)[1], lambda token, state: model(token, state)[0])


_LOAD = {"flash_xlstm": _ours, "transformers": _transformers, "xlstm_large": _xlstm_large}


def load(name: str, args: argparse.Namespace) -> LanguageModel:
    """A model of `args.size` in `args.dtype`, in eval mode."""
    if args.threads:
        torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    with made_on(torch.device(args.device), getattr(torch, args.dtype)):
        model = _LOAD[name](args.size)
    model.module.to(getattr(torch, args.dtype)).eval()
    return model


def weight_bytes(model: LanguageModel) -> int:
    """Bytes that a step reads: every parameter except the embedding table."""
    return sum(
        p.numel() * p.element_size()
        for name, p in model.module.named_parameters()
        if "embedding" not in name.split(".")[-2]
    )
