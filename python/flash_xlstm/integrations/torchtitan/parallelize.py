"""torchtitan's settings of parallelism as :func:`flash_xlstm.distributed.parallelize` takes them."""

from __future__ import annotations

from typing import Any

from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy
from torchtitan.config import TORCH_DTYPE_MAP
from torchtitan.distributed.activation_checkpoint import FullAC
from torchtitan.distributed.fsdp import disable_fsdp_gradient_division, enable_fsdp_symm_mem

from flash_xlstm.distributed import parallelize
from flash_xlstm.distributed.mesh import KNOWN
from flash_xlstm.integrations.torchtitan.model import XLSTM

_RESHARD = {"default": None, "always": True, "never": False}


def parallelize_xlstm(
    model: XLSTM,
    *,
    parallel_dims: Any,
    training: Any,
    parallelism: Any,
    compile_config: Any,
    ac_config: Any,
    dump_folder: str,
) -> XLSTM:
    """Splits a model over torchtitan's mesh. Gradients are summed and not averaged: torchtitan divides the loss by the
    tokens of all ranks.

    Raises:
        ValueError: a setting cannot be had with this model.
    """
    if ac_config not in (None, FullAC.Config()):
        raise ValueError(
            f"activation_checkpoint is {ac_config}; it must be 'full', without options, or 'none' for an xLSTM, whose "
            "blocks do their own"
        )
    if training.enable_cpu_offload:
        raise ValueError("training.enable_cpu_offload is True; it must be False for an xLSTM")
    # Size 1 has no ranks to talk to, but dp_shard has the mixed precision.
    names = [name for name in KNOWN if name == "dp_shard" or getattr(parallel_dims, name) > 1]
    parallelize(
        model.model,
        parallel_dims.get_mesh(names),
        mixed_precision=MixedPrecisionPolicy(
            param_dtype=TORCH_DTYPE_MAP[training.mixed_precision_param],
            reduce_dtype=TORCH_DTYPE_MAP[training.mixed_precision_reduce],
            cast_forward_inputs=False,
        ),
        checkpointing=ac_config is not None,
        compile=compile_config.backend if compile_config.enable and "model" in compile_config.components else False,
        reshard_after_forward=_RESHARD[parallelism.fsdp_reshard_after_forward],
        sequence_parallel=parallelism.enable_sequence_parallel,
        async_tensor_parallel=compile_config.enable_async_tensor_parallel,
    )
    disable_fsdp_gradient_division(model)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_force_sum_reduction_for_comms(True)  # otherwise a sum of products by 1, which gloo has not
    if parallelism.enable_fsdp_symm_mem:
        enable_fsdp_symm_mem(model)
    return model
