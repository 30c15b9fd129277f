"""The dimensions of a mesh, by name."""

from __future__ import annotations

import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

SHARD = ("dp_shard", "cp")  # over which weights are sharded
DATA = ("dp_replicate", *SHARD)  # over which gradients are averaged
KNOWN = (*DATA, "tp")
_GROUPS: dict[dist.ProcessGroup | None, dist.ProcessGroup] = {}


def check_mesh(mesh: DeviceMesh) -> tuple[str, ...]:
    """The names of the dimensions.

    Raises:
        TypeError, ValueError: `mesh` is no mesh, or has dimensions without names, of unknown ones, or in another order.
    """
    if not isinstance(mesh, DeviceMesh):
        raise TypeError(f"mesh is a {type(mesh).__name__}; it must be a torch.distributed.device_mesh.DeviceMesh")
    names = mesh.mesh_dim_names
    if names is None:
        raise ValueError(f"mesh has no mesh_dim_names; they must be from {', '.join(KNOWN)}")
    for name in names:
        if name not in KNOWN:
            raise ValueError(f"mesh has a dimension {name!r}; its mesh_dim_names must be from {', '.join(KNOWN)}")
    if list(names) != sorted(names, key=KNOWN.index):
        raise ValueError(f"mesh has the mesh_dim_names {names}; they must be in the order of {', '.join(KNOWN)}")
    return names


def cpu_group() -> dist.ProcessGroup | None:
    """All ranks, joined by gloo, for what is not the model's: a checkpoint that is written beside the run must not meet
    its collectives, and what is exchanged is in the CPU's memory. None without ranks. The first call is collective."""
    if not dist.is_initialized():
        return None
    world = dist.group.WORLD
    if world not in _GROUPS:
        _GROUPS.clear()
        _GROUPS[world] = dist.new_group(backend="gloo")
    return _GROUPS[world]
