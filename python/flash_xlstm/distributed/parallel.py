"""A model over a mesh: tensor parallel, checkpointing, compilation and sharding, in the order in which they must be."""

from __future__ import annotations

import importlib.util
import warnings
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed import _symmetric_memory
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard

from flash_xlstm.distributed import context
from flash_xlstm.distributed.mesh import DATA, SHARD, check_mesh
from flash_xlstm.distributed.tensor import check_tensor_parallel, tensor_parallel
from flash_xlstm.models import xLSTMForCausalLM

Model = TypeVar("Model", bound=xLSTMForCausalLM)
_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def parallelize(
    model: Model,
    mesh: DeviceMesh,
    *,
    mixed_precision: torch.dtype | MixedPrecisionPolicy | None = None,
    checkpointing: bool | int = False,
    compile: bool | str = False,
    float8: str | None = None,
    reshard_after_forward: bool | int | None = None,
    sequence_parallel: bool = True,
    async_tensor_parallel: bool = False,
) -> Model:
    """Arranges a model for training on the ranks of a mesh, in place. Parameters become DTensors: make the optimizer
    afterwards.

    The names of the mesh's dimensions say what is done, in any combination:

    - ``dp_replicate``: each rank has all weights. With ``dp_shard``, shards are replicated (HSDP): the mesh
      (nodes, GPUs a node) of (``dp_replicate``, ``dp_shard``) gathers weights inside a node and sums gradients across.
    - ``dp_shard``: weights, gradients and optimizer states are sharded, and gathered block by block (FSDP2).
    - ``cp``: each rank has a piece of every sequence (:func:`flash_xlstm.distributed.context.shard` cuts a batch).
      Weights are sharded over its ranks too.
    - ``tp``: heads, the feed-forward's features and the vocabulary are split (:func:`tensor_parallel`). The ranks of a
      ``tp`` group must be given the same batch.

    Every error is raised before anything is communicated or changed, and on every rank alike.

    Args:
        model: the weights as on one GPU, the same on every rank, or all on the meta device.
        mesh: of the dimensions above.
        mixed_precision: what weights are gathered and computed in; gradients are then summed in float32, and sharded
            weights keep their dtype. Or a policy of FSDP's own. None: the weights' dtype. It needs a ``dp_``
            or ``cp`` dimension; one of size 1 is enough.
        checkpointing: blocks keep little for the backward and compute the rest again; or only every so many-th block.
        compile: whether each block is compiled by torch.compile; or the name of a backend for it.
        float8: a recipe of :func:`flash_xlstm.training.convert_to_float8`. Not with ``tp``.
        reshard_after_forward: as for :func:`torch.distributed.fsdp.fully_shard`, of the blocks. It needs ``dp_shard``
            or ``cp``.
        sequence_parallel: with ``tp``, as for :func:`tensor_parallel`.
        async_tensor_parallel: with ``tp`` on CUDA, joined by NCCL, and `compile`: Inductor cuts the products behind
            gathers and before scatters into pieces, so that a piece is computed while the next is sent, through
            symmetric memory. All GPUs of a ``tp`` group must reach each other's memory.

    Returns:
        `model`.

    Raises:
        TypeError: `model`, `mesh` or another argument is of the wrong type.
        ValueError: a dimension of `mesh` is unknown or not in the order above; ``tp`` does not divide heads,
            feed-forward or vocabulary, or weights are in the wrong weight mode for it; arguments do not go together.
        ImportError: `float8` without torchao.
    """
    _check_model(model)
    for name, p in model.named_parameters():
        if type(p) is not nn.Parameter:
            raise ValueError(f"model is split already: {name} is a {type(p).__name__}; it must be as on one GPU")
    names = check_mesh(mesh)
    data = any(name in DATA for name in names)
    if mixed_precision is not None:
        _policy(mixed_precision)
        if not data:
            raise ValueError(
                f"mixed_precision is {mixed_precision}, but mesh has none of {', '.join(DATA)}; add one, of size 1 "
                "say, or convert the model"
            )
    _check_reshard(reshard_after_forward, names)
    if not isinstance(checkpointing, int) or checkpointing < 0:
        raise TypeError(f"checkpointing is {checkpointing!r}; it must be True, False or a number of blocks from 1 on")
    if not isinstance(sequence_parallel, bool):
        raise TypeError(f"sequence_parallel is {sequence_parallel!r}; it must be True or False")
    if not isinstance(compile, (bool, str)):
        raise TypeError(f"compile is {compile!r}; it must be True, False or the name of a backend")
    if not isinstance(async_tensor_parallel, bool):
        raise TypeError(f"async_tensor_parallel is {async_tensor_parallel!r}; it must be True or False")
    if async_tensor_parallel:
        _check_async(mesh, compile, sequence_parallel)
    if "tp" in names:
        check_tensor_parallel(model, mesh["tp"])
    if float8 is not None:
        if "tp" in names:
            raise ValueError(f"float8 is {float8!r}, but mesh has a dimension 'tp'; it must be None there")
        if importlib.util.find_spec("torchao") is None:
            raise ImportError('float8 needs torchao: pip install "flash-xlstm[float8]"')
        from flash_xlstm.training import convert_to_float8

        convert_to_float8(model, float8)
    if "cp" in names:
        context.set_group(model, mesh["cp"])
    if "tp" in names:
        tensor_parallel(model, mesh["tp"], sequence_parallel=sequence_parallel)
    if checkpointing:
        # The older name warns where there is the newer.
        enable: Any = getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)
        enable()
        for number, block in enumerate(model.backbone.blocks):
            block.gradient_checkpointing = number % checkpointing == 0
    if data:
        fsdp(model, mesh, mixed_precision=mixed_precision, reshard_after_forward=reshard_after_forward)
    if compile:
        # The forward of a sharded block, and not its call: hooks, which gather weights, stay outside.
        options: Any = None
        if async_tensor_parallel:
            options = {"_micro_pipeline_tp": True}
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", FutureWarning)  # torch 2.15 does it by itself
                _symmetric_memory.enable_symm_mem_for_group(mesh["tp"].get_group().group_name)
        for block in model.backbone.blocks:
            backend = "inductor" if compile is True else compile
            block.forward = torch.compile(block.forward, backend=backend, options=options)
    return model


def fsdp(
    model: Model,
    mesh: DeviceMesh,
    *,
    mixed_precision: torch.dtype | MixedPrecisionPolicy | None = None,
    reshard_after_forward: bool | int | None = None,
) -> Model:
    """Shards or replicates the weights of a model over the ``dp_`` and ``cp`` dimensions of a mesh, in place: each
    block is gathered by itself; the embeddings, the output norm and the head together. So the head's weight is whole
    where the model computes its loss, without logits.

    Args, Raises: as :func:`parallelize`.
    """
    _check_model(model)
    names = [name for name in check_mesh(mesh) if name in DATA]
    if not names:
        raise ValueError(f"mesh has the dimensions {mesh.mesh_dim_names}; it must have one of {', '.join(DATA)}")
    _check_reshard(reshard_after_forward, names)
    policy, name = _policy(mixed_precision), type(model).__name__
    parts = [*model.backbone.blocks, model]
    if names == ["dp_replicate"]:
        from torch.distributed._composable.replicate_with_fsdp import replicate

        for part in parts:
            replicate(part, mesh=mesh["dp_replicate"], mp_policy=policy)
    else:
        sharded = _sharded(mesh, names)
        for part in parts:
            # None for the model itself: what a backward needs first is not freed.
            reshard = None if part is model else reshard_after_forward
            fully_shard(part, mesh=sharded, mp_policy=policy, reshard_after_forward=reshard)
    type(model).__name__ = name  # torch gives it a prefix, and transformers writes it into config.json
    return model


def _sharded(mesh: DeviceMesh, names: list[str]) -> DeviceMesh:
    """The mesh to shard over: of one dimension, behind that of replicas if there is one."""
    over = [name for name in names if name in SHARD]
    if len(over) == 1:
        return mesh[tuple(names)]
    shards = mesh[tuple(over)]._flatten("dp_shard_cp")
    return DeviceMesh._concatenate([mesh["dp_replicate"], shards]) if "dp_replicate" in names else shards


def _check_async(mesh: DeviceMesh, compile: bool | str, sequence_parallel: bool) -> None:
    why = None
    if "tp" not in (mesh.mesh_dim_names or ()):
        why = f"mesh has the dimensions {mesh.mesh_dim_names}; it must have 'tp'"
    elif not sequence_parallel:
        why = "sequence_parallel is False; it must be True: there are no gathers and scatters otherwise"
    elif compile not in (True, "inductor"):
        why = f"compile is {compile!r}; it must be True: Inductor does it"
    elif mesh.device_type != "cuda":
        why = f"mesh is of {mesh.device_type} devices; they must be cuda"
    elif "nccl" not in (joined := dist.get_backend_config(mesh["tp"].get_group())):
        why = f"the tp ranks are joined by {joined}; it must be nccl"
    elif not hasattr(importlib.import_module("torch._inductor.config"), "_micro_pipeline_tp"):
        why = f"torch is {torch.__version__}, whose Inductor has no asynchronous tensor parallel"
    if why is not None:
        raise ValueError(f"async_tensor_parallel is True, but {why}")


def _check_model(model: Any) -> None:
    if not isinstance(model, xLSTMForCausalLM):
        raise TypeError(f"model is a {type(model).__name__}; it must be an xLSTMForCausalLM")
    if any(isinstance(module, FSDPModule) for module in model.modules()):
        raise ValueError("model is sharded already; it must be as on one GPU, or split over tp ranks")


def _check_reshard(value: Any, names: Any) -> None:
    if value is not None and not isinstance(value, int):
        raise TypeError(f"reshard_after_forward is {value!r}; it must be True, False, a number of ranks, or None")
    if value is not None and not any(name in SHARD for name in names):
        raise ValueError(
            f"reshard_after_forward is {value!r}, but mesh has neither of {', '.join(SHARD)}; it must be None"
        )


def _policy(mixed_precision: Any) -> MixedPrecisionPolicy:
    if isinstance(mixed_precision, MixedPrecisionPolicy):
        return mixed_precision
    if mixed_precision is not None and mixed_precision not in _DTYPES:
        raise TypeError(
            f"mixed_precision is {mixed_precision!r}; it must be one of {', '.join(map(str, _DTYPES))}, a "
            "MixedPrecisionPolicy, or None"
        )
    # Inputs are not cast: states, and the number that a loss is divided by, stay in float32. Embeddings come in the
    # dtype that they are gathered in.
    reduced = None if mixed_precision is None else torch.float32
    return MixedPrecisionPolicy(param_dtype=mixed_precision, reduce_dtype=reduced, cast_forward_inputs=False)
