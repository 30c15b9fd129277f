"""The processes of a run: one, or those that torchrun started."""

from __future__ import annotations

import os
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from flash_xlstm import distributed
from flash_xlstm.models import xLSTMForCausalLM
from flash_xlstm.training.errors import TrainingError


def join(device: str) -> None:
    """Joins the processes that torchrun started, if it did; each takes a GPU of its own.

    Args:
        device: the name of a device; "cuda" is this process's GPU afterwards.

    Raises:
        TrainingError: `device` is one GPU for all processes.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1 or "LOCAL_RANK" not in os.environ or dist.is_initialized():
        return
    if ":" in device:
        raise TrainingError(
            f"`device` {device}: under torchrun it must be auto, cuda or cpu: every process has its GPU"
        )
    if device != "cpu" and torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        dist.init_process_group("cpu:gloo,cuda:nccl")
    else:
        dist.init_process_group("gloo")


def leave() -> None:
    """Parts the processes that :func:`join` joined."""
    if dist.is_initialized():
        dist.destroy_process_group()


def restarted() -> bool:
    """Whether torchrun started the processes again, because one had died."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) > 0


class Ranks:
    """The processes of torch.distributed, each of which has a part of every batch; or this one.

    Attributes:
        size: number of processes.
        rank: number of this one.
        first: whether it is the one that writes files and logs.
    """

    def __init__(self) -> None:
        joined = dist.is_available() and dist.is_initialized()
        self.size = dist.get_world_size() if joined else 1
        self.rank = dist.get_rank() if joined else 0
        self.first = self.rank == 0

    def arrange(self, model: xLSTMForCausalLM, shard: bool, dtype: torch.dtype, compile: bool) -> None:
        """Replicates a model, or shards its weights, to compute in `dtype`."""
        from torch.distributed.device_mesh import init_device_mesh

        mesh = init_device_mesh(
            model.device.type, (self.size,), mesh_dim_names=("dp_shard" if shard else "dp_replicate",)
        )
        distributed.parallelize(model, mesh, mixed_precision=None if dtype == torch.float32 else dtype, compile=compile)

    def any(self, value: bool) -> bool:
        """Whether it is true on any of the processes, all of which must call this."""
        if self.size == 1:
            return value
        found = torch.tensor(int(value))
        dist.all_reduce(found, dist.ReduceOp.MAX, group=distributed.cpu_group())
        return bool(found)

    def mean(self, value: float) -> float:
        if self.size == 1:
            return value
        total = torch.tensor(value, dtype=torch.float64)
        dist.all_reduce(total, group=distributed.cpu_group())
        return float(total) / self.size

    def wait(self) -> None:
        """Waits for all processes."""
        if self.size > 1:
            dist.barrier(group=distributed.cpu_group())

    def whole(self, values: Any) -> Any:
        """A nest of dicts whose split tensors are whole and on the CPU; on other processes than the first, None in
        their place. All must call this."""
        if isinstance(values, dict):
            return {name: self.whole(value) for name, value in values.items()}
        if self.size == 1 or not hasattr(values, "full_tensor"):
            return values
        tensor = values.full_tensor()
        return tensor.cpu() if self.first else None

    def split(self, entries: dict[int, dict[str, Tensor]], parameters: list[Any]) -> dict[int, dict[str, Any]]:
        """The optimizer's moments, by the parameters' numbers, split as these are."""
        if self.size == 1:
            return entries
        from torch.distributed.tensor import distribute_tensor

        def part(t: Tensor, p: Any) -> Any:
            if t.shape != p.shape:
                return t  # the number of steps
            return distribute_tensor(t.to(p.device), p.device_mesh, p.placements, src_data_rank=None)

        return {n: {name: part(t, parameters[n]) for name, t in values.items()} for n, values in entries.items()}
