"""Subject train: a training step of whole models (forward, backward, fused AdamW), pure bfloat16 on CUDA.

`time_ms` is the median of `--steps` steps behind `--warmup` ones. `tflops` counts 6 operations a token and parameter,
the input embeddings left out; `share` is that over 989. `products_ms` is every product of the step's linear layers
(forward, gradients of inputs and of weights; forward twice where a checkpoint makes it again) in bfloat16, replayed in
one CUDA graph right after the steps; `step_over_products` is the step in multiples of it. `peak_gib` is the most that
was allocated in a warm step, weights and optimizer included. `kept_bytes` is what a forward pass leaves allocated, over
tokens and blocks; `block_bytes` that without what surrounds the blocks, of models that are not compiled.
Cases `tokens_SEQ` take as many tokens a step at every length. Case `packed` has the tokens of `eager` in one row of
documents, of 1 to `seq` tokens each; steps of `eager` alternate with its own, and `dense_ms` is their time. Peers run
in processes of their own.
With `--profile`, rows `profile` and `kernel` say where the GPU's time of a step goes.
"""

from __future__ import annotations

import argparse
import gc
import importlib
import itertools
import json
import re
import statistics
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import language_models
from graphs import capture
from processes import outputs
from run import _cpu_times_ms, describe, free_memory, measured, pair

PEAK_TFLOPS = 989.0  # bfloat16, dense, of an H100 or H200 SXM by its data sheet
# vocabulary, width, blocks, heads; batch and seq
SIZES = {
    "1.4b": ((50304, 2048, 24, 4), (8, 2048)),
    "7b_8_blocks": ((50304, 4096, 8, 8), (4, 2048)),
    "long": ((256, 1024, 8, 4), (256, 2048)),
    "tiny": ((256, 64, 2, 2), (2, 64)),
}


@dataclass(frozen=True)
class Case:
    size: str = "1.4b"
    weight_mode: str = "single"
    compiled: bool = False
    checkpointed: bool = False
    float8: str | None = None
    model: str = "flash_xlstm"
    seq: int | None = None  # at the tokens of the size
    packed: bool = False

    @property
    def weights(self) -> tuple:
        """What cases with one model share."""
        return self.model, self.size, self.weight_mode, self.float8


SEQS = (2048, 8192, 32768, 131072, 524288)
CASES = {
    "eager": Case(),
    "compiled": Case(compiled=True),
    "checkpointed": Case(checkpointed=True),
    "checkpointed_compiled": Case(checkpointed=True, compiled=True),
    "packed": Case(packed=True),
    "eager_fused": Case(weight_mode="fused"),
    "compiled_fused": Case(weight_mode="fused", compiled=True),
    "7b_compiled": Case("7b_8_blocks", compiled=True),
    "7b_float8": Case("7b_8_blocks", compiled=True, float8="rowwise"),
    "7b_float8_fused": Case("7b_8_blocks", "fused", compiled=True, float8="rowwise"),
    "7b_float8_tensorwise": Case("7b_8_blocks", compiled=True, float8="tensorwise"),
    "7b_float8_gw_hp": Case("7b_8_blocks", compiled=True, float8="rowwise_with_gw_hp"),
    "xlstm_large": Case(model="xlstm_large"),
    "transformers": Case(model="transformers"),
    **{f"tokens_{seq}": Case("long", checkpointed=True, seq=seq) for seq in SEQS},
}
DEFAULT = ("eager", "compiled", "checkpointed", "eager_fused", "compiled_fused", "7b_compiled", "7b_float8")

# Kernels by their names, the first that fits; the order counts.
CLASSES = {
    "optimizer": r"multi_tensor_apply|adam",
    "loss": r"soft_?cap|softmax|nll_?loss|cross_entrop|scaling_kernel|loss_",
    "mlstm": r"mlstm|scan_gates|gate_gradients|outputs_kernel|states_kernel|chunk_sums|chunk_gates|chunk_table"
    r"|stabilizer|token_gradients|dk_dv",
    "products": r"products_kernel|nvjet|gemm|gemv|cutlass|splitk|xmma|scaled_mm|sm90_|addmm|aten::mm",
    "copies": r"^(?!triton).*(catarray|memcpy|memset|copy|fill|functor(onself|onother)?_add)|^triton_poi_fused_cat"
    r"|^aten::(cat|add_?)$",
    "pointwise": r"norm|float8_|swiglu|sum_rows|triton_|silu|sigmoid|mul",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    cuda = torch.cuda.is_available()
    parser.add_argument("--cases", nargs="+", choices=CASES, default=DEFAULT, metavar="CASE", help=", ".join(CASES))
    parser.add_argument("--size", choices=SIZES, default=None if cuda else "tiny", help="instead of each case's own")
    parser.add_argument("--shape", type=pair, help="batch x seq, as 8x2048, instead of each case's own")
    parser.add_argument("--tokens", type=int, help="a step's, of the cases tokens_SEQ; default: those of the size")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--warmup", type=int, default=3)
    parser.add_argument("--profile", action="store_true")
    parser.add_argument("--profile-kernels", type=int, default=30, help="rows of single kernels, the longest first")
    parser.add_argument("--device", default="cuda" if cuda else "cpu")
    parser.add_argument("--peer-seconds", type=float, default=180.0, help="the most that a peer's process takes")


@dataclass
class Prepared:
    """A model on its device with an optimizer; `loss_of(forward, ids)` is its mean loss by `forward`."""

    module: nn.Module
    loss_of: Callable[[Callable[..., Any], Tensor], Tensor]
    optimizer: torch.optim.Optimizer
    checkpointed: bool = False


def _hugging_face_loss(forward: Callable[..., Any], ids: Tensor) -> Tensor:
    return forward(input_ids=ids, labels=ids, use_cache=False).loss  # transformers' own fails with one


def _packed_loss(ids: Tensor, longest: int) -> Callable[[Callable[..., Any], Tensor], Tensor]:
    """The loss of documents in one row, of 1 to `longest` tokens, as transformers' flattening collator gives them."""
    tokens = ids.numel()
    lengths = torch.randint(1, longest + 1, (tokens,), generator=torch.Generator().manual_seed(0))
    ends = lengths.cumsum(0)
    offsets = F.pad(torch.cat([ends[ends < tokens], torch.tensor([tokens])]), (1, 0)).int().to(ids.device)

    def loss_of(forward: Callable[..., Any], ids: Tensor) -> Tensor:
        row = ids.view(1, -1)
        return forward(input_ids=row, labels=row, use_cache=False, cu_seq_lens_q=offsets).loss

    return loss_of


def _logits_loss(forward: Callable[..., Any], ids: Tensor) -> Tensor:
    return F.cross_entropy(forward(ids)[:, :-1].float().flatten(0, 1), ids[:, 1:].flatten())


def _ours(sizes: tuple, case: Case) -> tuple[nn.Module, Callable]:
    models = importlib.import_module("flash_xlstm.models")
    vocabulary, width, blocks, heads = sizes
    options = {"num_hidden_layers": blocks, "num_heads": heads, "weight_mode": case.weight_mode}
    return models.xLSTMForCausalLM(models.xLSTMConfig(vocabulary, width, **options)), _hugging_face_loss


def _transformers(sizes: tuple, case: Case) -> tuple[nn.Module, Callable]:
    sys.modules.setdefault("xlstm", None)  # type: ignore[arg-type]  # it would run that package instead of its own code
    peer = importlib.import_module("transformers.models.xlstm.modeling_xlstm")
    if peer.external_xlstm:
        raise RuntimeError("transformers runs the xlstm package, which this process has imported")
    vocabulary, width, blocks, heads = sizes
    config = peer.xLSTMConfig(vocab_size=vocabulary, hidden_size=width, num_hidden_layers=blocks, num_heads=heads)

    def loss(forward: Callable[..., Any], ids: Tensor) -> Tensor:
        # Its mLSTM multiplies float32 by bfloat16 where all weights are bfloat16; autocast casts both.
        with torch.autocast(ids.device.type, torch.bfloat16, enabled=ids.is_cuda):
            return _hugging_face_loss(forward, ids)

    return peer.xLSTMForCausalLM(config), loss


def _xlstm_large(sizes: tuple, case: Case) -> tuple[nn.Module, Callable]:
    package = importlib.import_module("xlstm.xlstm_large.model")
    vocabulary, width, blocks, heads = sizes
    options = {"mode": "train", "chunkwise_kernel": "chunkwise--triton_xl_chunk", "return_last_states": False}
    config = package.xLSTMLargeConfig(
        embedding_dim=width, num_heads=heads, num_blocks=blocks, vocab_size=vocabulary, **options
    )
    model = package.xLSTMLarge(config)
    language_models.with_float32_gates(model)
    return model, _logits_loss


MODELS = {"flash_xlstm": _ours, "transformers": _transformers, "xlstm_large": _xlstm_large}


def prepare(case: Case, size: str, device: torch.device) -> Prepared:
    torch.manual_seed(0)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    with language_models.made_on(device, dtype):
        module, loss_of = MODELS[case.model](SIZES[size][0], case)
    module.to(dtype).train()
    if case.float8 is not None:
        importlib.import_module("flash_xlstm.training").convert_to_float8(
            module, case.float8, emulate=device.type == "cpu"
        )
    optimizer = torch.optim.AdamW(module.parameters(), lr=1e-4, fused=True)
    return Prepared(module, loss_of, optimizer)


def _times_ms(step: Callable[[], object], device: torch.device, steps: int) -> list[float]:
    """Times of steps one behind the other."""
    if device.type == "cpu":
        return _cpu_times_ms(step, steps)
    events = [torch.cuda.Event(enable_timing=True) for _ in range(steps + 1)]
    events[0].record()
    for event in events[1:]:
        step()
        event.record()
    torch.cuda.synchronize()
    return [start.elapsed_time(stop) for start, stop in itertools.pairwise(events)]


def _blocks(module: nn.Module) -> nn.ModuleList:
    """The longest list of modules in a model."""
    return max((m for m in module.modules() if isinstance(m, nn.ModuleList)), key=len)


def products_ms(module: nn.Module, tokens: int, checkpointed: bool, device: torch.device) -> tuple[float, float]:
    """Time of all products of a step's linear layers in one CUDA graph, and their operations."""
    layers = [layer for layer in module.modules() if isinstance(layer, nn.Linear)]
    again = {id(layer) for layer in _blocks(module).modules()} if checkpointed else set()
    dtype = layers[0].weight.dtype
    columns = {size for layer in layers for size in layer.weight.shape}
    given = {size: torch.randn(tokens, size, device=device, dtype=dtype) for size in columns}
    taken = {size: torch.empty(tokens, size, device=device, dtype=dtype) for size in columns}
    gradients = {tuple(layer.weight.shape): torch.empty_like(layer.weight) for layer in layers}
    weights = [(layer.weight.detach(), 1 + (id(layer) in again)) for layer in layers]

    def run() -> None:
        for weight, times in weights:
            for _ in range(times):
                torch.mm(given[weight.shape[1]], weight.t(), out=taken[weight.shape[0]])
        for weight, _ in reversed(weights):
            torch.mm(given[weight.shape[0]], weight, out=taken[weight.shape[1]])
            torch.mm(given[weight.shape[0]].t(), given[weight.shape[1]], out=gradients[tuple(weight.shape)])

    with torch.no_grad():
        replay = capture(run).replay if device.type == "cuda" else run
        replay()
        time_ms = statistics.median(_times_ms(replay, device, 5))
    return time_ms, sum(2.0 * tokens * weight.numel() * (2 + times) for weight, times in weights)


def _kept_bytes(prepared: Prepared, forward: Callable[[], Tensor], hooks: bool) -> tuple[int, int | None]:
    """What a forward pass leaves allocated, and what its blocks do."""
    allocated: dict[str, int] = {}
    handles = []
    if hooks:
        blocks = _blocks(prepared.module)

        def note(name: str) -> None:
            allocated[name] = torch.cuda.memory_allocated()

        handles = [
            blocks[0].register_forward_pre_hook(lambda *_: note("before")),
            blocks[-1].register_forward_hook(lambda *_: note("after")),
        ]
    before = torch.cuda.memory_allocated()
    loss = forward()
    kept = torch.cuda.memory_allocated() - before
    del loss
    for handle in handles:
        handle.remove()
    return kept, allocated["after"] - allocated["before"] if hooks else None


def class_of(kernel: str) -> str:
    """The class of a kernel by its name."""
    name = kernel.lower()
    return next((group for group, pattern in CLASSES.items() if re.search(pattern, name)), "rest")


def _profile(step: Callable[[], object], device: torch.device, common: dict, kernels: int) -> Iterator[dict]:
    """Where the time of a step goes: a row of classes, and rows of kernels, ms and calls a step."""
    cuda, steps = device.type == "cuda", 2
    activities = [torch.profiler.ProfilerActivity.CUDA if cuda else torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities) as profiler:
        for _ in range(steps):
            step()
        if cuda:
            torch.cuda.synchronize()
    kind = torch.autograd.DeviceType.CUDA if cuda else torch.autograd.DeviceType.CPU
    found = []
    for event in profiler.key_averages():
        time_us = event.self_device_time_total if cuda else event.self_cpu_time_total
        if event.device_type == kind and not getattr(event, "is_user_annotation", False) and time_us > 0:
            found.append((time_us / steps / 1e3, event.count / steps, event.key))
    found.sort(reverse=True)
    totals = dict.fromkeys((*CLASSES, "rest"), 0.0)
    for time_ms, _, name in found:
        totals[class_of(name)] += time_ms
    all_ms = sum(totals.values())
    yield {"what": "profile", **common, **{f"{group}_ms": ms for group, ms in totals.items()}, "all_ms": all_ms}
    for time_ms, calls, name in found[:kernels]:
        yield {"what": "kernel", **common, "class": class_of(name), "ms": time_ms, "calls": calls, "kernel": name[:200]}


def _measure(row: dict, rows: list[dict], prepared: Prepared, case: Case, args: argparse.Namespace) -> None:
    device, cuda = torch.device(args.device), args.device.startswith("cuda")
    module, optimizer = prepared.module, prepared.optimizer
    batch, seq = row["batch"], row["seq"]
    ids = torch.randint(3, SIZES[row["size"]][0][0], (batch, seq), device=device)
    if case.checkpointed != prepared.checkpointed:
        module.gradient_checkpointing_enable() if case.checkpointed else module.gradient_checkpointing_disable()
        prepared.checkpointed = case.checkpointed
    forward: Callable[..., Any] = module
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    if case.compiled:
        forward = torch.compile(module, fullgraph=True)
    losses: list[Tensor] = []
    loss_of = _packed_loss(ids, seq) if case.packed else prepared.loss_of

    def step(loss_of: Callable[..., Tensor] = loss_of) -> None:
        loss = loss_of(forward, ids)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses[:] = [loss.detach()]

    for _ in range(args.warmup):
        step()
        if case.packed:
            step(prepared.loss_of)
    if case.compiled:
        counters = torch._dynamo.utils.counters
        row["graphs"] = counters["stats"]["unique_graphs"]
        row["graph_breaks"] = sum(counters["graph_break"].values())
    if case.packed:
        turns = itertools.cycle((prepared.loss_of, loss_of))
        both = _times_ms(lambda: step(next(turns)), device, 2 * args.steps)
        row["dense_ms"], times = statistics.median(both[::2]), both[1::2]
    else:
        times = _times_ms(step, device, args.steps)
    row["time_ms"] = time_ms = statistics.median(times)
    row["least_ms"], row["most_ms"] = min(times), max(times)
    tokens, blocks = batch * seq, len(_blocks(module))
    embedding = next(m for m in module.modules() if isinstance(m, nn.Embedding)).weight.numel()
    row["parameters"] = sum(p.numel() for p in module.parameters())
    row["tokens_per_s"] = tokens / time_ms * 1e3
    row["tflops"] = 6 * (row["parameters"] - embedding) * tokens / time_ms / 1e9
    row["share"] = row["tflops"] / PEAK_TFLOPS
    if cuda:
        torch.cuda.reset_peak_memory_stats()
        step()
        row["peak_gib"] = torch.cuda.max_memory_allocated() / 2**30
        row["resting_gib"] = torch.cuda.memory_allocated() / 2**30
        kept, in_blocks = _kept_bytes(prepared, lambda: loss_of(forward, ids), not case.compiled)
        row["kept_bytes"] = kept / tokens / blocks
        if in_blocks is not None:
            row["block_bytes"] = in_blocks / tokens / blocks
    row["loss"] = losses[0].item()
    row["products_ms"], operations = products_ms(module, tokens, case.checkpointed, device)
    row["products_tflops"] = operations / row["products_ms"] / 1e9
    row["step_over_products"] = time_ms / row["products_ms"]
    if args.profile:
        common = {"case": row["case"], "step_ms": time_ms}
        rows += _profile(step, device, common, args.profile_kernels)


def _in_own_process(name: str, args: argparse.Namespace) -> Iterator[dict]:
    """The rows of one case, measured by another process."""
    row = {"what": "train", "case": name}
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "rows.json"
        command = [sys.executable, str(Path(__file__).parent / "run.py"), "train", "--cases", name, "--out", str(out)]
        command += ["--steps", str(args.steps), "--warmup", str(args.warmup), "--device", args.device]
        command += ["--size", args.size] if args.size else []
        command += ["--shape", "x".join(map(str, args.shape))] if args.shape else []
        command += ["--profile", "--profile-kernels", str(args.profile_kernels)] if args.profile else []
        ((text, ended),) = outputs([command], args.peer_seconds)
        if out.exists():
            yield from json.loads(out.read_text())["results"]
        else:
            last = text.strip().splitlines()[-1:] or ["no output"]
            yield {**row, "error": last[0][:300] if ended else f"took longer than {args.peer_seconds:g} s"}


def run(args: argparse.Namespace) -> Iterator[dict]:
    device = torch.device(args.device)
    done = {row["case"] for row in args.earlier_rows if "time_ms" in row}
    prepared: Prepared | None = None
    weights = None
    for name in args.cases:
        case = CASES[name]
        if name in done:
            continue
        if case.model != "flash_xlstm" and len(args.cases) > 1:
            prepared = weights = None
            free_memory(device)
            yield from _in_own_process(name, args)
            continue
        size = args.size or case.size
        batch, seq = args.shape or SIZES[size][1]
        if case.seq is not None:
            tokens = args.tokens or batch * seq
            batch, seq = max(1, tokens // case.seq), min(tokens, case.seq)
        row = {"what": "train", "case": name, "model": case.model, "size": size, "batch": batch, "seq": seq}
        row |= {"weight_mode": case.weight_mode, "compiled": case.compiled, "checkpointed": case.checkpointed}
        row["float8"] = case.float8
        if case.weights != weights:
            prepared = weights = None
            gc.collect()
            free_memory(device)
            try:
                prepared, weights = prepare(case, size, device), case.weights
            except Exception as error:
                yield {**row, "error": describe(error)}
                continue
        assert prepared is not None
        further: list[dict] = []
        yield from measured(row, lambda: _measure(row, further, prepared, case, args), device)  # noqa: B023
        yield from further
        if "error" in row:  # what it leaves, gradients say, is nobody's
            prepared = weights = None


_TABLE = (
    "case", "size", "batch", "seq", "time_ms", "dense_ms", "peak_gib", "block_bytes", "tokens_per_s", "tflops", "share",
    "products_ms", "step_over_products", "graph_breaks", "loss", "error",
)  # fmt: skip


def summarize(rows: list[dict]) -> list[dict]:
    """A line a case, then how far the time a token at constant tokens is from that of the shortest rows; the profile
    of each case."""
    trained = [row for row in rows if row["what"] == "train"]
    lines = [{name: row[name] for name in _TABLE if name in row} for row in trained]
    flat = sorted(
        (row["seq"], row["time_ms"] / row["batch"] / row["seq"])
        for row in trained
        if row["case"].startswith("tokens_") and "time_ms" in row
    )
    lines += [{"case": f"tokens_{s}", "time_over_shortest": ms / flat[0][1]} for s, ms in flat[1:]]
    return lines + [{k: v for k, v in row.items() if k != "what"} for row in rows if row["what"] == "profile"]
