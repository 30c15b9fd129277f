"""Subject serving: our models on vLLM, beside our own `generate`, and a step's time on the host beside Mamba-2's.

Rows "serving": all requests are there at the start, with prompts of one length. `tokens_per_s` counts new tokens over
the whole run. `first_token_ms` and `token_ms` are medians, over requests and over decode steps. `generate` reads the
same prompts as one batch. Rows "host": the time until vLLM's runner has prepared and launched a decode step. On a CPU
that is the step itself, whose model is small there.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import os
import statistics
import tempfile
import time
from collections.abc import Iterator

import torch

import language_models
from run import describe


def add_arguments(parser: argparse.ArgumentParser) -> None:
    cuda = torch.cuda.is_available()
    parser.add_argument("--size", choices=language_models.SIZES, default="7b" if cuda else "tiny")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16" if cuda else "float32")
    parser.add_argument("--concurrency", nargs="+", type=int, default=[1, 8, 32] + [128] * cuda)
    parser.add_argument("--prompt", type=int, default=128)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument(
        "--host-steps", type=int, default=64, help="decode steps to measure on the host; 0 leaves it out"
    )
    parser.add_argument("--eager", action="store_true", help="without torch.compile and CUDA graphs")


def _save_ours(folder: str, args: argparse.Namespace):
    from flash_xlstm.models import xLSTMConfig, xLSTMForCausalLM

    vocabulary, width, blocks, heads = language_models.SIZES[args.size]
    config = xLSTMConfig(vocabulary, width, num_hidden_layers=blocks, num_heads=heads, weight_mode="fused")
    torch.manual_seed(0)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    with language_models.made_on(device, getattr(torch, args.dtype)):
        model = xLSTMForCausalLM(config)
    model.save_pretrained(folder)
    return model.eval()


def _save_mamba2(folder: str, args: argparse.Namespace) -> None:
    from transformers import Mamba2Config

    vocabulary, width, blocks, _ = language_models.SIZES[args.size]
    sizes = {"vocab_size": vocabulary, "hidden_size": width, "num_hidden_layers": blocks, "expand": 2, "n_groups": 1}
    config = Mamba2Config(**sizes, head_dim=64, num_heads=width // 32, architectures=["Mamba2ForCausalLM"])
    config.save_pretrained(folder)


@contextlib.contextmanager
def _engine(folder: str, args: argparse.Namespace, **options) -> Iterator:
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # the runner is looked at
    from vllm import LLM
    from vllm.distributed import cleanup_dist_env_and_memory

    llm = LLM(
        folder,
        dtype=args.dtype,
        skip_tokenizer_init=True,
        enforce_eager=args.eager,
        max_num_seqs=max(args.concurrency),
        max_model_len=args.prompt + max(args.new_tokens, args.host_steps + 8),
        **options,
    )
    try:
        yield llm.llm_engine
    finally:
        llm.llm_engine.engine_core.shutdown()
        del llm
        gc.collect()
        cleanup_dist_env_and_memory()


def _serve(engine, prompts: list[list[int]], new_tokens: int) -> tuple[float, list[float], list[float]]:
    """The time of a run, until each request's first token, and of each step after the last of these; in seconds."""
    from vllm import SamplingParams

    sampling = SamplingParams(temperature=0, max_tokens=new_tokens, ignore_eos=True, detokenize=False)
    begin = time.perf_counter()
    for number, ids in enumerate(prompts):
        engine.add_request(str(number), {"prompt_token_ids": ids}, sampling)
    first: dict[str, float] = {}
    steps = []
    while engine.has_unfinished_requests():
        started, decodes = time.perf_counter(), len(first) == len(prompts)
        outputs = engine.step()
        now = time.perf_counter()
        for output in outputs:
            if output.outputs[0].token_ids:
                first.setdefault(output.request_id, now - begin)
        if decodes:
            steps.append(now - started)
    return time.perf_counter() - begin, list(first.values()), steps


def _prompts(count: int, args: argparse.Namespace) -> list[list[int]]:
    vocabulary = language_models.SIZES[args.size][0]
    return torch.randint(3, min(vocabulary, 20_000), (count, args.prompt)).tolist()


def _on_vllm(engine, args: argparse.Namespace) -> Iterator[dict]:
    for count in args.concurrency:
        prompts = _prompts(count, args)
        _serve(engine, prompts, 4)
        total, first, steps = _serve(engine, _prompts(count, args), args.new_tokens)
        yield _row("vllm", count, args, total) | {
            "first_token_ms": statistics.median(first) * 1e3,
            "token_ms": statistics.median(steps) * 1e3 if steps else None,
        }


def _by_generate(model, args: argparse.Namespace) -> Iterator[dict]:
    options = {"do_sample": False, "eos_token_id": None, "pad_token_id": 1}
    for count in args.concurrency:
        for new_tokens in (4, args.new_tokens):  # the first call warms up
            ids = torch.tensor(_prompts(count, args), device=model.device)
            begin = time.perf_counter()
            model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=new_tokens, **options).cpu()
            total = time.perf_counter() - begin
        yield _row("generate", count, args, total)


def _row(engine: str, count: int, args: argparse.Namespace, total: float) -> dict:
    row = {"what": "serving", "engine": engine, "size": args.size, "dtype": args.dtype, "concurrency": count}
    row |= {"prompt": args.prompt, "new_tokens": args.new_tokens, "tokens_per_s": count * args.new_tokens / total}
    return row


def _host_times(engine, name: str, args: argparse.Namespace) -> dict:
    runner = engine.engine_core.engine_core.model_executor.driver_worker.worker.model_runner
    own, times = runner.execute_model, []

    def timed(*given, **named):
        begin = time.perf_counter()
        try:
            return own(*given, **named)
        finally:
            times.append(time.perf_counter() - begin)

    runner.execute_model = timed
    count = min(8, max(args.concurrency))
    _serve(engine, _prompts(count, args), args.host_steps + 8)
    times = times[-args.host_steps - 1 : -1]
    row = {"what": "host", "model": name, "size": args.size, "dtype": args.dtype, "rows": count}
    return row | {"host_ms": statistics.median(times) * 1e3}


def run(args: argparse.Namespace) -> Iterator[dict]:
    with tempfile.TemporaryDirectory() as folder:
        model = _save_ours(folder, args)
        yield from _by_generate(model, args)
        del model
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        with _engine(folder, args) as engine:
            yield from _on_vllm(engine, args)
            if args.host_steps:
                yield _host_times(engine, "flash_xlstm", args)
    if args.host_steps:
        with tempfile.TemporaryDirectory() as folder:
            _save_mamba2(folder, args)
            try:
                with _engine(folder, args, load_format="dummy") as engine:
                    yield _host_times(engine, "mamba2", args)
            except Exception as error:
                yield {"what": "host", "model": "mamba2", "error": describe(error)}
