"""Training on many GPUs, by torch.distributed: what is here arranges a model for it and leaves the loop to the caller.

Example:
    Under ``torchrun --nproc-per-node 8``, the weights of a model sharded over 8 GPUs, and computed with in bfloat16:

    >>> from torch.distributed.device_mesh import init_device_mesh
    >>> from flash_xlstm.distributed import mean_labels, parallelize
    >>> mesh = init_device_mesh("cuda", (8,), mesh_dim_names=("dp_shard",))  # doctest: +SKIP
    >>> parallelize(model, mesh, mixed_precision=torch.bfloat16, checkpointing=True)  # doctest: +SKIP
    >>> optimizer = torch.optim.AdamW(model.parameters())  # doctest: +SKIP
    >>> model(ids, labels=ids, num_items_in_batch=mean_labels(ids, mesh)).loss.backward()  # doctest: +SKIP
"""

from typing import TYPE_CHECKING

from flash_xlstm._lazy import attach

if TYPE_CHECKING:
    from flash_xlstm.distributed.checkpoint import load as load
    from flash_xlstm.distributed.checkpoint import load_pretrained as load_pretrained
    from flash_xlstm.distributed.checkpoint import newest as newest
    from flash_xlstm.distributed.checkpoint import save as save
    from flash_xlstm.distributed.checkpoint import save_pretrained as save_pretrained
    from flash_xlstm.distributed.data import mean_labels as mean_labels
    from flash_xlstm.distributed.loss import vocabulary_parallel_cross_entropy as vocabulary_parallel_cross_entropy
    from flash_xlstm.distributed.mesh import cpu_group as cpu_group
    from flash_xlstm.distributed.parallel import fsdp as fsdp
    from flash_xlstm.distributed.parallel import parallelize as parallelize
    from flash_xlstm.distributed.tensor import tensor_parallel as tensor_parallel
    from flash_xlstm.distributed.tensor import tensor_parallel_plan as tensor_parallel_plan

_HOMES = {
    "checkpoint": ("load", "load_pretrained", "newest", "save", "save_pretrained"),
    "data": ("mean_labels",),
    "loss": ("vocabulary_parallel_cross_entropy",),
    "mesh": ("cpu_group",),
    "parallel": ("fsdp", "parallelize"),
    "tensor": ("tensor_parallel", "tensor_parallel_plan"),
}
_NAMES = {name: f"{__name__}.{module}" for module, names in _HOMES.items() for name in names}
__all__ = sorted(_NAMES)

__getattr__, __dir__ = attach(__name__, _NAMES)
