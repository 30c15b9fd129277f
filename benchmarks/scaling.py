"""A training step of whole models on several GPUs, as flash_xlstm.distributed arranges it, under torchrun:

    torchrun --nproc-per-node 2 benchmarks/scaling.py --mesh dp_shard=2 --size 7b --out scaling.json

Weights are float32 shards, computed with in bfloat16 (under a mesh of tp alone they are bfloat16), without data: they
are made where they lie. `tokens_per_s_gpu` is the tokens of all GPUs over the median step and the GPUs; `peak_gib` the
most of any rank. A run on one GPU (`--mesh dp_shard=1`) is what shares are of. Along `cp` every sequence is cut into
pieces. `--out` adds a row to a results file.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from pathlib import Path

import torch
from torch import distributed as dist
from torch.distributed.device_mesh import init_device_mesh

import train
from flash_xlstm.distributed import context, parallelize
from flash_xlstm.models import xLSTMConfig, xLSTMForCausalLM
from run import environment

SIZES = {**train.SIZES, "7b": ((50304, 4096, 32, 8), (4, 2048))}


def _model(size: str, mesh, args: argparse.Namespace, device: str) -> xLSTMForCausalLM:
    vocabulary, width, blocks, heads = SIZES[size][0]
    alone = not any(name.startswith("dp_") for name in mesh.mesh_dim_names)
    with torch.device("meta"):
        config = xLSTMConfig(vocab_size=vocabulary, hidden_size=width, num_hidden_layers=blocks, num_heads=heads)
        model = xLSTMForCausalLM(config).train()
        model = model.to(torch.bfloat16) if alone else model
    mixed = None if alone else torch.bfloat16
    parallelize(
        model, mesh, mixed_precision=mixed, checkpointing=args.checkpointing, compile=args.compile, float8=args.float8,
        reshard_after_forward=False if args.keep else None, async_tensor_parallel=args.async_tp,
    )  # fmt: skip
    model.to_empty(device=device)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "gate_preact.bias" in name:
                p.fill_(-10.0 if "igate" in name else 4.5)
            elif p.dim() < 2:
                p.fill_(1.0)
            else:
                p.normal_(0.0, 0.02)
    return model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mesh", required=True, help="dimensions and sizes, as dp_shard=2,tp=2")
    parser.add_argument("--size", choices=SIZES, default="7b_8_blocks")
    parser.add_argument("--batch", type=int, help="sequences of a data-parallel rank; default: the size's")
    parser.add_argument("--seq", type=int, help="tokens of a sequence; default: the size's")
    parser.add_argument("--checkpointing", type=int, default=0, help="every so many-th block; 0: none")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--float8", help="a recipe")
    parser.add_argument("--async-tp", action="store_true", help="with tp and --compile")
    parser.add_argument("--keep", action="store_true", help="keep weights between forward and backward")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--warmup", type=int, default=3)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()

    cuda = args.device == "cuda"
    if cuda:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl" if cuda else "gloo")
    sizes = {name: int(size) for name, size in (each.split("=") for each in args.mesh.split(","))}
    mesh = init_device_mesh(args.device, tuple(sizes.values()), mesh_dim_names=tuple(sizes))
    model = _model(args.size, mesh, args, args.device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    (vocabulary, *_), (batch, seq) = SIZES[args.size]
    batch, seq = args.batch or batch, args.seq or seq
    alike = sizes.get("tp", 1) * sizes.get("cp", 1)  # the last dimensions: these ranks have the same batch
    ranks = dist.get_world_size() // alike
    torch.manual_seed(dist.get_rank() // alike)
    ids = torch.randint(3, vocabulary, (batch, seq))
    given = {"input_ids": ids, "labels": ids}
    if "cp" in sizes:
        given = context.shard(given, mesh["cp"])
    given = {name: t.to(args.device) if isinstance(t, torch.Tensor) else t for name, t in given.items()}

    times = []
    for number in range(args.warmup + args.steps):
        if cuda:
            torch.cuda.synchronize()
        began = time.perf_counter()
        loss = model(**given).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if cuda:
            torch.cuda.synchronize()
        if number >= args.warmup:
            times.append(time.perf_counter() - began)
    peak = torch.tensor(float(torch.cuda.max_memory_allocated()) if cuda else 0.0).to(args.device)
    dist.all_reduce(peak, dist.ReduceOp.MAX)
    if dist.get_rank() == 0:
        step = statistics.median(times)
        row = {
            "what": "scaling", "size": args.size, "mesh": sizes, "batch": batch, "seq": seq,
            "checkpointing": args.checkpointing, "compiled": args.compile, "float8": args.float8, "keep": args.keep,
            "async_tp": args.async_tp,
            "time_ms": 1e3 * step, "least_ms": 1e3 * min(times), "most_ms": 1e3 * max(times),
            "tokens_per_s_gpu": ranks * batch * seq / step / dist.get_world_size(), "peak_gib": peak.item() / 2**30,
            "loss": loss.item(),
        }  # fmt: skip
        print(json.dumps(row))
        if args.out:
            document = {"subject": "scaling", "environment": environment(), "results": []}
            if args.out.exists():
                document = json.loads(args.out.read_text())
            document["results"].append(row)
            args.out.write_text(json.dumps(document, indent=1) + "\n")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
