"""Engines of vLLM on small checkpoints. They run in this process, so that tests see the cache and the scheduler."""

from __future__ import annotations

import contextlib
import gc
import os
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")  # GiB
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"

NO_SPECIAL = dict.fromkeys(("pad_token_id", "bos_token_id", "eos_token_id"))


def make_checkpoint(folder: Path, **options):
    """A model whose output depends on its states, and that is saved in `folder`."""
    from flash_xlstm.models import xLSTMConfig, xLSTMForCausalLM

    torch.manual_seed(0)
    sizes = {"vocab_size": 256, "hidden_size": 64, "num_hidden_layers": 3, "num_heads": 4}
    model = xLSTMForCausalLM(xLSTMConfig(**{**sizes, **NO_SPECIAL, **options})).eval()
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.dim() > 1:
                p.normal_(0, 1.5 / p.shape[1] ** 0.5)
            elif "igate_preact.bias" in name or (name.endswith(".bias") and "gate_preact" not in name):
                p.normal_()
    model.save_pretrained(folder)
    return model


def prompts(*lengths: int, seed: int = 1) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(256, (length,), generator=generator).tolist() for length in lengths]


def continuations(model, asked: list[list[int]], new_tokens: int) -> list[list[int]]:
    """What our own model generates for each prompt alone."""
    options = {"max_new_tokens": new_tokens, "do_sample": False}
    return [model.generate(torch.tensor([ids]), **options)[0, len(ids) :].tolist() for ids in asked]


class Engine:
    """An engine with its parts at hand."""

    def __init__(self, folder: Path, **options) -> None:
        from vllm import LLM

        options = {"enforce_eager": True, "dtype": "float32", "max_num_seqs": 32, **options}
        self.llm = LLM(str(folder), skip_tokenizer_init=True, disable_log_stats=False, **options)
        self.config = self.llm.llm_engine.vllm_config

    def generate(self, asked: list[list[int]], new_tokens: int):
        from vllm import SamplingParams

        sampling = SamplingParams(temperature=0, max_tokens=new_tokens, ignore_eos=True, detokenize=False)
        return self.llm.generate([{"prompt_token_ids": ids} for ids in asked], sampling, use_tqdm=False)

    def tokens(self, asked: list[list[int]], new_tokens: int) -> list[list[int]]:
        return [list(output.outputs[0].token_ids) for output in self.generate(asked, new_tokens)]

    @property
    def scheduler(self):
        return self.llm.llm_engine.engine_core.engine_core.scheduler

    @property
    def free_blocks(self) -> int:
        return self.scheduler.kv_cache_manager.block_pool.get_num_free_blocks()

    @property
    def layers(self) -> list:
        return [
            layer
            for layer in self.config.compilation_config.static_forward_context.values()
            if type(layer).__name__ == "xLSTMLayer"
        ]

    def spoil(self) -> None:
        """Writes NaN to every state."""
        for layer in self.layers:
            for pool in layer.kv_cache:
                pool.fill_(torch.nan)


@contextlib.contextmanager
def engine_of(folder: Path, **options) -> Iterator[Engine]:
    from vllm.distributed import cleanup_dist_env_and_memory

    engine = Engine(folder, **options)
    try:
        yield engine
    finally:
        engine.llm.llm_engine.engine_core.shutdown()
        del engine
        gc.collect()
        cleanup_dist_env_and_memory()


@pytest.fixture(scope="session")
def served(tmp_path_factory) -> SimpleNamespace:
    """A model, its checkpoint, and functions of this file."""
    folder = tmp_path_factory.mktemp("checkpoint")
    model = make_checkpoint(folder)
    return SimpleNamespace(
        model=model,
        folder=folder,
        prompts=prompts,
        engine_of=engine_of,
        make_checkpoint=make_checkpoint,
        continuations=lambda asked, new_tokens=24: continuations(model, asked, new_tokens),
        continuations_of=continuations,
    )
