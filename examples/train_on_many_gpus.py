"""Trains a model on the bytes of a file, on many GPUs (or processes of a CPU), in the shortest loop that is complete.

It begins a run, or goes on from its last checkpoint::

    export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
    torchrun --nproc-per-node 8 --max-restarts 3 examples/train_on_many_gpus.py --data FILE --out FOLDER \
        --mesh dp_replicate=2,dp_shard=2,tp=2

So torchrun restarts a run of which a process was killed, and a run may go on with another mesh. Which mesh to take, and
what the variable is for: docs/scaling.md.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

import torch
from torch import Tensor
from torch import distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from flash_xlstm.distributed import load, mean_labels, newest, parallelize, save
from flash_xlstm.models import xLSTMConfig, xLSTMForCausalLM


def batch_of(data: Tensor, step: int, rank: int, args: argparse.Namespace) -> Tensor:
    """The windows of a data-parallel rank at a step: (batch, sequence)."""
    generator = torch.Generator().manual_seed(step * 2**20 + rank)
    starts = torch.randint(len(data) - args.sequence, (args.batch,), generator=generator)
    return torch.stack([data[s : s + args.sequence] for s in starts.tolist()]).long()


def data_dimensions(mesh: DeviceMesh) -> list[str]:
    """Those over which batches differ."""
    return [name for name in mesh.mesh_dim_names if name.startswith("dp_")]


def data_rank(mesh: DeviceMesh) -> int:
    """Ranks of a ``tp`` group have the same."""
    rank = 0
    for name in data_dimensions(mesh):
        rank = rank * mesh[name].size() + mesh.get_local_rank(name)
    return rank


def train(args: argparse.Namespace) -> list[float]:
    """The losses of all steps, those before a restart too."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl" if device == "cuda" else "gloo")
    sizes = dict(each.split("=") for each in args.mesh.split(","))
    mesh = init_device_mesh(device, tuple(map(int, sizes.values())), mesh_dim_names=tuple(sizes))

    torch.manual_seed(0)  # every rank makes the same weights
    config = xLSTMConfig(
        vocab_size=256, hidden_size=args.hidden, num_heads=args.heads, num_hidden_layers=args.layers
    )  # fmt: skip
    model = xLSTMForCausalLM(config).to(device).train()
    mixed = torch.bfloat16 if device == "cuda" and data_dimensions(mesh) else None
    parallelize(model, mesh, mixed_precision=mixed, checkpointing=args.checkpointing, compile=args.compile)
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.rate)

    step, losses, saving = 0, [], None
    last = newest(args.out)
    if last is not None:
        values = load(last, model, optimizer)
        step, losses = values["step"], values["losses"]
    data = torch.frombuffer(bytearray(Path(args.data).read_bytes()), dtype=torch.uint8)
    rank = data_rank(mesh)
    while step < args.steps:
        ids = batch_of(data, step, rank, args).to(device)
        loss = model(ids, labels=ids, num_items_in_batch=mean_labels(ids, mesh)).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        step += 1
        mean = loss.detach().clone()
        dist.all_reduce(mean)  # ranks of a tp group have the same loss
        losses.append(mean.item() / dist.get_world_size())
        if step % args.save_every == 0 or step == args.steps:
            if saving is not None:
                saving.result()
            saving = save(
                Path(args.out) / f"step-{step}", model, optimizer, {"step": step, "losses": losses}, asynchronous=True
            )
        if dist.get_rank() == 0:
            print(f"step {step}: loss {losses[-1]:.4f}", flush=True)
    if saving is not None:
        saving.result()
    dist.destroy_process_group()
    return losses


def positive(text: str) -> int:
    """Reads a count of at least 1. argparse names the option in its error."""
    if int(text) < 1:
        raise ValueError(text)
    return int(text)


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="a file")
    parser.add_argument("--out", required=True, help="folder of the checkpoints, which all ranks share")
    parser.add_argument("--mesh", default="dp_shard=2", help="dimensions and sizes, as dp_shard=4,tp=2")
    parser.add_argument("--steps", type=positive, default=100)
    parser.add_argument("--save-every", type=positive, default=50)
    parser.add_argument("--batch", type=positive, default=4, help="sequences of a data-parallel rank")
    parser.add_argument("--sequence", type=positive, default=256)
    parser.add_argument("--hidden", type=positive, default=256)
    parser.add_argument("--heads", type=positive, default=4)
    parser.add_argument("--layers", type=positive, default=4)
    parser.add_argument("--rate", type=float, default=1e-3)
    parser.add_argument("--checkpointing", action="store_true")
    parser.add_argument("--compile", action="store_true")
    return parser.parse_args(argv)


if __name__ == "__main__":
    train(parse())
