"""Subject dropin: models of other libraries before and after `flash_xlstm.integrations.accelerate`, in one run.

Random weights, the same in both. On a CPU calls alternate, so that other load on the machine affects both; the
originals compute with their plain PyTorch code. On CUDA they compute with their own kernels, which need a compiler or
Triton, and the language models run under bfloat16 autocast; mlstm_kernels' calls get float32 gates.
`ratio` is the original's median time over the accelerated model's; `difference` the largest difference of the outputs
over the largest output. A library that is not installed is a row with an error.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import importlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

import language_models
from flash_xlstm.integrations import accelerate
from run import alternating_times_ms, measured, median_time_ms


@dataclass(frozen=True)
class Size:
    batch: int
    seq: int
    width: int  # a multiple of 128, as transformers' cache wants
    blocks: int
    series: int  # rows of a time-series model


SIZES = {
    "tiny": Size(1, 16, 128, 1, 2),
    "small": Size(2, 512, 256, 4, 8),
    "large": Size(8, 2048, 1024, 8, 256),
}
HEADS, VOCABULARY = 4, 1024
Run = Callable[[nn.Module], Tensor]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--size", choices=SIZES, help="default: small on a CPU, large on CUDA")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, default=2, help="of a CPU")
    parser.add_argument("--seconds", type=float, default=3.0, help="time for each model of each row")


def _ids(size: Size, device: torch.device) -> Tensor:
    return torch.randint(VOCABULARY, (size.batch, size.seq), device=device)


def _transformers(size: Size, device: torch.device) -> tuple[nn.Module, dict[str, Run]]:
    transformers = importlib.import_module("transformers")
    config = transformers.xLSTMConfig(
        vocab_size=VOCABULARY, hidden_size=size.width, num_hidden_layers=size.blocks, num_heads=HEADS, chunk_size=64,
        chunkwise_kernel=_kernel("chunkwise--native_autograd", "chunkwise--triton_xl_chunk", device),
    )  # fmt: skip
    model = transformers.xLSTMForCausalLM(config)
    ids = _ids(size, device)
    caches: dict[nn.Module, dict] = {}

    def token(model: nn.Module) -> Tensor:
        if model not in caches:
            output = model(ids, use_cache=True)
            name = "cache" if hasattr(output, "cache") else "cache_params"  # older versions
            caches[model] = {name: output[name]}
        return model(ids[:, :1], use_cache=True, **caches[model]).logits

    return model, {"sequence": lambda m: m(ids, use_cache=False).logits, "token": token}


def _xlstm_large(size: Size, device: torch.device) -> tuple[nn.Module, dict[str, Run]]:
    large = importlib.import_module("xlstm.xlstm_large.model")
    config = large.xLSTMLargeConfig(
        embedding_dim=size.width, num_heads=HEADS, num_blocks=size.blocks, vocab_size=VOCABULARY, mode="inference",
        return_last_states=True,
        chunkwise_kernel=_kernel("chunkwise--native_autograd", "chunkwise--triton_xl_chunk", device),
        sequence_kernel=_kernel("native_sequence__native", "native_sequence__triton", device),
        step_kernel=_kernel("native", "triton", device),
    )  # fmt: skip
    ids = _ids(size, device)
    states: dict[nn.Module, dict] = {}

    def token(model: nn.Module) -> Tensor:
        if model not in states:
            states[model] = model(ids)[1]
        return model(ids[:, :1], states[model])[0]

    return large.xLSTMLarge(config), {"sequence": lambda m: m(ids)[0], "token": token}


def _xlstm(size: Size, device: torch.device) -> tuple[nn.Module, dict[str, Run]]:
    xlstm = importlib.import_module("xlstm")
    slstm = xlstm.sLSTMLayerConfig(num_heads=HEADS, backend=_kernel("vanilla", "cuda", device))
    config = xlstm.xLSTMLMModelConfig(
        mlstm_block=xlstm.mLSTMBlockConfig(mlstm=xlstm.mLSTMLayerConfig(num_heads=HEADS)),
        slstm_block=xlstm.sLSTMBlockConfig(slstm=slstm, feedforward=xlstm.FeedForwardConfig()),
        context_length=size.seq, num_blocks=size.blocks, embedding_dim=size.width, vocab_size=VOCABULARY,
        slstm_at=[size.blocks // 2],
    )  # fmt: skip
    ids = _ids(size, device)
    states: dict[nn.Module, dict] = {}

    def token(model: nn.Module) -> Tensor:
        y, states[model] = model.step(ids[:, :1], states.get(model))
        return y

    return xlstm.xLSTMLMModel(config), {"sequence": lambda m: m(ids), "token": token}


def _tirex2(size: Size, device: torch.device) -> tuple[nn.Module, dict[str, Run]]:
    tirex2 = importlib.import_module("tirex2.model.tirex2")
    patch, context, future = 32, 64 * 32, 10 * 32
    mixer = {"embedding_dim": size.width, "num_heads": HEADS}
    templates = {
        kind: {"time_mixer": {"model_type": f"bi-{kind}", **mixer}, "variate_mixer": mixer, "dropout": 0.0, "eps": 1e-6}
        for kind in ("mlstm", "slstm")
    }
    recipe = ["slstm" if block % 2 else "mlstm" for block in range(size.blocks)]
    model = tirex2.TiRex2(
        stack_config={"templates": templates, "recipe": recipe}, num_blocks=size.blocks, embedding_dim=size.width,
        input_patch_size=patch, output_patch_size=patch, quantiles=[0.1, 0.5, 0.9], scaler_cfg={}, h_expand=2,
        tokenizer_cfg={"output_patch_size": patch, "input_patch_size": patch, "input_patch_stride": patch},
        context_len=context, future_len=future, input_ff_dim=2 * size.width, act_func="ReLU", dropout=0.0,
        device=device.type,
    )  # fmt: skip
    batch = {
        "x": torch.randn(size.series, context + future, device=device),
        "group_vector": torch.arange(size.series, device=device) // 2,
        "target_mask": torch.arange(size.series, device=device) % 2 == 0,
    }
    return model, {"sequence": lambda m: m(batch)}


def _tirex(size: Size, device: torch.device) -> tuple[nn.Module, dict[str, Run]]:
    tirex = importlib.import_module("tirex.models.tirex")
    settings = {
        "input_patch_size": 32, "output_patch_size": 32, "quantiles": [0.1, 0.5, 0.9], "input_ff_dim": 2 * size.width,
        "block_kwargs": {"embedding_dim": size.width, "num_heads": HEADS, "num_blocks": size.blocks},
    }  # fmt: skip
    patches = torch.randn(size.series, 64, 64, device=device)  # with their masks
    model = tirex.TiRexZero(_kernel("torch", "cuda", device), settings, train_ctx_len=2048)
    return model, {"sequence": lambda m: m._forward_model(patches)}


MODELS = {
    "transformers": _transformers,
    "xlstm_large": _xlstm_large,
    "xlstm": _xlstm,
    "tirex2": _tirex2,
    "tirex": _tirex,
}


def _kernel(cpu: str, cuda: str, device: torch.device) -> str:
    return cuda if device.type == "cuda" else cpu


@torch.no_grad()
def _randomize(model: nn.Module) -> None:
    generator = torch.Generator().manual_seed(0)
    for p in model.parameters():
        p.copy_(torch.randn(p.shape, generator=generator) * (0.3 if p.dim() < 2 else p.shape[-1] ** -0.5))


def _train(run: Run, model: nn.Module) -> None:
    model.zero_grad()
    run(model).float().square().mean().backward()


def _pair(name: str, size: Size, device: torch.device) -> tuple[list[nn.Module], dict[str, Run]]:
    """The original, the same accelerated, and what to run."""
    models = []
    for _ in range(2):
        torch.manual_seed(0)
        model, runs = MODELS[name](size, device)
        _randomize(model)
        models.append(model.to(device).eval())
    if device.type == "cuda":
        language_models.with_float32_gates(models[0])
    accelerate(models[1])
    return models, runs


def _measure(row: dict, models: list[nn.Module], run: Run, device: torch.device, seconds: float) -> None:
    if row["what"] == "training":
        calls = [functools.partial(_train, run, model.train()) for model in models]
    else:
        calls = [torch.no_grad()(functools.partial(run, model.eval())) for model in models]
        first = [call().float() for call in calls]
        row["difference"] = ((first[0] - first[1]).abs().max() / first[0].abs().max()).item()
    if device.type == "cuda":
        times = [median_time_ms(call, device, budget_s=seconds) for call in calls]
    else:
        times = alternating_times_ms(calls, budget_s=seconds)
    row.update(original_ms=times[0], accelerated_ms=times[1], ratio=times[0] / times[1])


def run(args: argparse.Namespace) -> Iterator[dict]:
    device = torch.device(args.device)
    torch.set_num_threads(args.threads)
    name = args.size or ("large" if device.type == "cuda" else "small")
    size = SIZES[name]
    for model in args.models:
        common = {"model": model, "device": device.type, "size": name, "threads": args.threads}
        precision = contextlib.nullcontext()
        if device.type == "cuda" and not model.startswith("tirex"):
            precision = torch.autocast("cuda", torch.bfloat16)
        made: list = []
        failed = common | {"what": "build"}
        rows = list(measured(failed, lambda name=model, made=made: made.extend(_pair(name, size, device)), device))
        if "error" in failed:
            yield from rows
            continue
        pair, runs = made
        cases = [("sequence", runs["sequence"]), ("training", runs["sequence"])]
        cases += [("token", runs["token"])] if "token" in runs else []
        with precision:
            for what, call in cases:
                row = common | {"what": what}
                measure = functools.partial(_measure, row, pair, call, device, args.seconds)
                yield from measured(row, measure, device)
