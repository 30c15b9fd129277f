"""Batches that differ from rank to rank."""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from flash_xlstm.distributed.mesh import DATA, check_mesh


def mean_labels(
    labels: Tensor | Iterable[Tensor], mesh: DeviceMesh, *, ignore_index: int = -100, shifted: bool = False
) -> Tensor:
    """The labels that count in a step, divided by the number of data-parallel ranks: the `num_items_in_batch` with
    which the mean of the ranks' gradients, which data parallelism makes, is the gradient of the mean over all labels of
    all ranks.

    Without it each rank's loss is the mean of its own labels, and ranks with few labels weigh as much as others. The
    sum of the ranks' losses, divided by their number, is the step's loss.

    Args:
        labels: this rank's labels (batch, seq) of a step; of each of its parts, where gradients are accumulated, and
            every part is then given what this returns. Labels that do not count must be `ignore_index`, those at
            padding and of packed documents' first tokens too. A row's first label does not count.
        shifted: whether they are ``shift_labels``, of which the first counts too: those of
            :func:`flash_xlstm.distributed.context.shard`, say.
        mesh: as for :func:`parallelize`. All its ranks must call this.

    Returns:
        float64, (), on the device of the labels. Nothing waits for it.

    Raises:
        ValueError: `labels` is empty, or a part of it has not two dimensions; or as :func:`parallelize` for `mesh`.
    """
    names = check_mesh(mesh)
    parts = [labels] if isinstance(labels, Tensor) else list(labels)
    if not parts or any(part.dim() != 2 for part in parts):
        found = ", ".join(str(tuple(part.shape)) for part in parts) or "none"
        raise ValueError(f"labels has shape {found}; it must be (batch, seq), or several of that")
    count = torch.stack([(part[:, 0 if shifted else 1 :] != ignore_index).sum() for part in parts]).sum()
    ranks = 1
    for name in names:
        if name in DATA:
            dist.all_reduce(count, group=mesh.get_group(name))
            ranks *= mesh[name].size()
    return count.double() / ranks
