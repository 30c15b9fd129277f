"""A mesh with a dimension ``cp``: loss and gradients are those of one process."""

from __future__ import annotations

import pytest
import torch
from models_of_ranks import batch, check_gradients, expected, make
from torch import distributed as dist
from torch.distributed.device_mesh import init_device_mesh

from flash_xlstm.distributed import context, mean_labels, parallelize


def _same(shape, names, options):
    mesh = init_device_mesh("cpu", shape, mesh_dim_names=names) if len(shape) < 3 else _part(shape, names)
    data = [name for name in names if name.startswith("dp_")]
    ranks = mesh[data[0]].size() if data else 1
    every = [batch(10 * r, seq=16, ignored=3 * r) for r in range(ranks)]
    loss, gradients = expected(make(), every)
    model = parallelize(make(), mesh, **options)
    ids, labels = every[mesh[data[0]].get_local_rank() if data else 0]
    piece = context.shard({"input_ids": ids, "labels": labels}, mesh["cp"])
    piece["num_items_in_batch"] = mean_labels(piece["shift_labels"], mesh, shifted=True)
    output = model(**piece)
    assert output.logits is None
    output.loss.backward()
    total = output.loss.detach().clone()
    dist.all_reduce(total)
    assert abs(total / dist.get_world_size() - loss) < 1e-5 * loss
    check_gradients(model, gradients, 5e-5)  # the forget gates' are small differences of sums over the sequence


def _part(shape, names):
    """A mesh that is part of another, as torchtitan's."""
    return init_device_mesh("cpu", (dist.get_world_size(),), mesh_dim_names=("all",))._unflatten(0, shape, names)


@pytest.mark.parametrize(
    ("shape", "names", "options"),
    [
        ((2,), ("cp",), {}),
        ((2, 2), ("dp_shard", "cp"), {"checkpointing": True}),
        ((2, 2), ("dp_replicate", "cp"), {}),
        ((2, 2), ("cp", "tp"), {}),
        ((2, 1, 2), ("dp_replicate", "dp_shard", "cp"), {}),
    ],
)
def test_mesh(on_ranks, shape, names, options):
    on_ranks(torch.tensor(shape).prod().item(), _same, shape, names, options)
