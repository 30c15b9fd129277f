"""Tensor parallel: heads, the feed-forward's features and the vocabulary, split over ranks."""

from __future__ import annotations

import functools
from typing import Any

import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, ParallelStyle, RowwiseParallel, parallelize_module

from flash_xlstm.distributed.loss import vocabulary_parallel_cross_entropy
from flash_xlstm.models import xLSTMForCausalLM
from flash_xlstm.nn import MultiHeadLayerNorm, RMSNorm

_UP = ("q", "k", "v", "ogate_preact", "igate_preact", "fgate_preact")


def tensor_parallel(model: xLSTMForCausalLM, mesh: DeviceMesh, *, sequence_parallel: bool = True) -> xLSTMForCausalLM:
    """Splits a model over the ranks of a mesh, in place, by :func:`tensor_parallel_plan`.

    All ranks must be given the same batch. Each then has the same loss, which is made without logits where the model
    does so on one rank: no rank has more logits than those of its part of the vocabulary. Blocks run module by module.
    For training, and for evaluation of whole sequences: caches and generation are not supported.

    Args:
        mesh: of one dimension.
        sequence_parallel: between the products, each rank has a part of the sequence: norms and the residual stream
            take 1 / ranks of the memory and time, and as many bytes are exchanged. A batch's seq must be a multiple of
            the ranks.

    Raises:
        ValueError: as :func:`check_tensor_parallel`; nothing has been changed then.
    """
    check_tensor_parallel(model, mesh)
    tied = model.lm_head.weight is model.backbone.embeddings.weight
    ranks = mesh.size()
    # From rank to rank the weights are the same already, or without data.
    plan = tensor_parallel_plan(model, sequence_parallel=sequence_parallel)
    parallelize_module(model, mesh, plan, src_data_rank=None)
    if tied:
        model.lm_head.weight = model.backbone.embeddings.weight
    for block in model.backbone.blocks:
        layer: Any = block.mlstm_layer
        for part, sizes in ((layer, ("num_heads", "qk_dim", "v_dim")), (layer.multihead_norm, ("num_heads",))):
            for name in sizes:
                setattr(part, name, getattr(part, name) // ranks)
        for module in (layer, block.ffn):
            module.projection_groups = {
                fused: {name: size // ranks for name, size in parts.items()}
                for fused, parts in module.projection_groups.items()
            }
    return model


def tensor_parallel_plan(model: xLSTMForCausalLM, *, sequence_parallel: bool = True) -> dict[str, ParallelStyle]:
    """How each module of a model is split, by name, for :func:`torch.distributed.tensor.parallel.parallelize_module`.

    Queries, keys, values, gates, the head norm and the feed-forward's up projections are split by their output features
    (heads come whole), the output projections by their input features, and embeddings and head by the vocabulary. The
    sizes that modules hold as numbers are not a plan's: :func:`tensor_parallel` sets them.
    """
    stream: Placement = Shard(1) if sequence_parallel else Replicate()
    plan: dict[str, ParallelStyle] = {
        "backbone.embeddings": _Embeddings(),
        "lm_head": _Head(output_layouts=Replicate()),
    }
    for number in range(len(model.backbone.blocks)):
        at = f"backbone.blocks.{number}"
        if number == 0 and sequence_parallel:
            plan[at] = _Split()
        plan[f"{at}.norm_mlstm"] = plan[f"{at}.norm_ffn"] = _Norm(stream)
        plan[f"{at}.mlstm_layer"] = plan[f"{at}.ffn"] = _Gathered(stream)
        plan[f"{at}.mlstm_layer.multihead_norm"] = _HeadNorm()
        for name in _UP:
            plan[f"{at}.mlstm_layer.{name}"] = ColwiseParallel()
        plan[f"{at}.ffn.proj_up_gate"] = plan[f"{at}.ffn.proj_up"] = ColwiseParallel()
        plan[f"{at}.mlstm_layer.out_proj"] = plan[f"{at}.ffn.proj_down"] = RowwiseParallel(output_layouts=stream)
    plan["backbone.out_norm"] = _Norm(stream, gathers=sequence_parallel)
    return plan


def check_tensor_parallel(model: xLSTMForCausalLM, mesh: DeviceMesh) -> None:
    """Checks that a model can be split over the ranks of a mesh.

    Raises:
        ValueError: it is in weight mode "fused", the mesh has several dimensions, or its ranks do not divide a size.
    """
    if mesh.ndim != 1:
        raise ValueError(f"mesh has {mesh.ndim} dimensions; for tensor parallel it must have one: mesh['tp']")
    config, ranks = model.config, mesh.size()
    if config.weight_mode != "single":
        raise ValueError(
            f"model is in weight_mode {config.weight_mode!r}; it must be 'single' to be split over tp ranks: call "
            "model.set_weight_mode('single') first"
        )
    for name in ("num_heads", "ffn_dim", "vocab_size"):
        size = getattr(config, name)
        if size % ranks:
            raise ValueError(f"mesh has {ranks} tp ranks; {name}, which is {size}, must be a multiple of them")


def _distribute(module: nn.Module, mesh: DeviceMesh, placement: Placement) -> None:
    for name, p in list(module.named_parameters(recurse=False)):
        split = distribute_tensor(p, mesh, [placement], src_data_rank=None)
        module.register_parameter(name, nn.Parameter(split, requires_grad=p.requires_grad))


class _Embeddings(ParallelStyle):
    """Embeddings of a rank's part of the vocabulary, summed over ranks. torch's own style makes the gradient of the
    whole vocabulary on every rank."""

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        assert isinstance(module, nn.Embedding)
        _distribute(module, device_mesh, Shard(0))
        module.forward = functools.partial(_embed, module, device_mesh)  # type: ignore[method-assign]
        return module


def _embed(module: nn.Embedding, mesh: DeviceMesh, ids: Tensor) -> Tensor:
    weight: Any = module.weight
    part = weight.to_local()
    mine = ids - mesh.get_local_rank() * len(part)
    others = (mine < 0) | (mine >= len(part))
    if not ids.is_cuda and ((ids < 0) | (ids >= len(weight))).any():
        raise IndexError(f"input_ids are out of range; they must be from 0 to {len(weight) - 1}")
    x = F.embedding(mine.masked_fill(others, 0), part).masked_fill(others[..., None], 0.0)
    return DTensor.from_local(x, mesh, [Partial()], run_check=False).redistribute(placements=[Replicate()]).to_local()


class _Norm(ParallelStyle):
    """A norm of the residual stream, or what stands in its place, with whole weights; `gathers` puts the sequence
    together behind it."""

    def __init__(self, stream: Placement, *, gathers: bool = False) -> None:
        super().__init__()
        self.stream, self.gathers = stream, gathers

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        if isinstance(module, RMSNorm):
            _distribute(module, device_mesh, Replicate())
            # A rank's part of the sequence makes a part of the gradient.
            module.gradient_placements = (Partial() if self.stream.is_shard() else Replicate(),)
        if self.gathers:

            def gather(_: nn.Module, args: Any, y: Tensor) -> Tensor:
                split = DTensor.from_local(y, device_mesh, [self.stream], run_check=False)
                return split.redistribute(placements=[Replicate()]).to_local()

            module.register_forward_hook(gather)
        return module


class _HeadNorm(ParallelStyle):
    """The norm of the heads that a rank has."""

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        assert isinstance(module, MultiHeadLayerNorm)
        _distribute(module, device_mesh, Shard(0))
        module.gradient_placements = (Shard(0),)
        return module


class _Gathered(ParallelStyle):
    """A module whose linear layers read the whole sequence: it is put together once for all of them."""

    def __init__(self, stream: Placement) -> None:
        super().__init__()
        self.stream = stream

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        def gather(_: nn.Module, args: Any) -> Any:
            x = DTensor.from_local(args[0], device_mesh, [self.stream], run_check=False)
            return x.redistribute(placements=[Replicate()]), *args[1:]

        module.register_forward_pre_hook(gather)
        return module


class _Split(ParallelStyle):
    """A module, the first block, of whose input each rank takes its part of the sequence."""

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        ranks = device_mesh.size()

        def split(_: nn.Module, args: Any) -> Any:
            if args[0].shape[1] % ranks:
                raise ValueError(
                    f"input_ids or inputs_embeds has {args[0].shape[1]} tokens in a sequence (of all rows, where they "
                    f"are packed); with sequence_parallel they must be a multiple of the {ranks} tp ranks"
                )
            x = DTensor.from_local(args[0], device_mesh, [Replicate()], run_check=False)
            return x.redistribute(placements=[Shard(1)]).to_local(), *args[1:]

        module.register_forward_pre_hook(split)
        return module


class _Head(ColwiseParallel):
    """A head that, besides logits, makes the loss of its part of the vocabulary."""

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        module = super()._apply(module, device_mesh)
        module.cross_entropy = functools.partial(_cross_entropy, module, device_mesh.get_group())
        return module


def _cross_entropy(head: nn.Module, group: dist.ProcessGroup, hidden: Tensor, labels: Tensor, **options: Any) -> Tensor:
    weight: Any = head.weight
    return vocabulary_parallel_cross_entropy(hidden, weight.to_local(), labels, group, **options)
