"""Tensor parallel: heads, the feed-forward's features and the vocabulary, split over ranks."""

from __future__ import annotations

import functools
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, ParallelStyle, RowwiseParallel, parallelize_module

from flash_xlstm.distributed.loss import vocabulary_parallel_cross_entropy
from flash_xlstm.models import xLSTMForCausalLM
from flash_xlstm.nn import MultiHeadLayerNorm, RMSNorm
from flash_xlstm.nn.xlstm_7b import residual
from flash_xlstm.ops import _common

# The newer names, where torch has them: it warns of the older.
_all_gather: Any = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter: Any = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
_LOOKED_AT = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_UP = ("q", "k", "v", "ogate_preact", "igate_preact", "fgate_preact")
_LINEAR = (
    *(f".mlstm_layer.{name}" for name in (*_UP, "out_proj")),
    ".proj_up_gate",
    ".proj_up",
    ".proj_down",
    "lm_head",
)


def tensor_parallel(model: xLSTMForCausalLM, mesh: DeviceMesh, *, sequence_parallel: bool = True) -> xLSTMForCausalLM:
    """Splits a model over the ranks of a mesh, in place, by :func:`tensor_parallel_plan`.

    All ranks must be given the same batch. Each then has the same loss, which is made without logits where the model
    does so on one rank: no rank has more logits than those of its part of the vocabulary. For training, and for
    evaluation of whole sequences: caches and generation are not supported.

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
        block._halves = functools.partial(_halves, block, _Ranks(mesh, sequence_parallel), _as_they_are(block))
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
        ValueError: it is in weight mode "fused", has other layers than :class:`torch.nn.Linear` (adapters, quantized),
            the mesh has several dimensions, or its ranks do not divide a size.
    """
    if mesh.ndim != 1:
        raise ValueError(f"mesh has {mesh.ndim} dimensions; for tensor parallel it must have one: mesh['tp']")
    config, ranks = model.config, mesh.size()
    if config.weight_mode != "single":
        raise ValueError(
            f"model is in weight_mode {config.weight_mode!r}; it must be 'single' to be split over tp ranks: call "
            "model.set_weight_mode('single') first"
        )
    for name, module in model.named_modules():
        if name.endswith(_LINEAR) and type(module) is not nn.Linear:
            raise ValueError(
                f"{name} is a {type(module).__name__}; it must be a torch.nn.Linear to be split over tp ranks"
            )
    for name in ("num_heads", "ffn_dim", "vocab_size"):
        size = getattr(config, name)
        if size % ranks:
            raise ValueError(f"mesh has {ranks} tp ranks; {name}, which is {size}, must be a multiple of them")


def _distribute(module: nn.Module, mesh: DeviceMesh, placement: Placement) -> None:
    for name, p in list(module.named_parameters(recurse=False)):
        split = distribute_tensor(p, mesh, [placement], src_data_rank=None)
        module.register_parameter(name, nn.Parameter(split, requires_grad=p.requires_grad))


class _Ranks:
    """What a block's halves exchange (:class:`flash_xlstm.nn.xlstm_7b.residual.Ranks`)."""

    def __init__(self, mesh: DeviceMesh, sequence_parallel: bool) -> None:
        self.group, self.size, self.split = mesh.get_group(), mesh.size(), sequence_parallel

    def gather(self, t: Tensor) -> Tensor:
        if not self.split:
            return t
        parts = t.new_empty(self.size * t.shape[0], *t.shape[1:])
        _all_gather(parts, t.contiguous(), self.group)
        return parts.unflatten(0, (self.size, -1)).transpose(0, 1).flatten(1, 2)

    def reduce(self, t: Tensor) -> Tensor:
        if not self.split:
            dist.all_reduce(t, group=self.group)  # of which nobody else has a view
            return t
        parts = t.unflatten(1, (self.size, -1)).transpose(0, 1).contiguous()
        sums = t.new_empty(parts.shape[1:])
        _reduce_scatter(sums, parts.flatten(0, 1), group=self.group)
        return sums


def _halves(
    block: Any, ranks: _Ranks, split: Any, x: Tensor
) -> tuple[residual.MlstmHalf | None, residual.FeedForwardHalf | None]:
    """Those of a rank's parts. None where a block has to run module by module: modules are not as tensor_parallel left
    them, biases other than the gates', weights of another dtype, or torch.compile, which does not trace DTensors into
    functions of autograd."""
    layer, ffn, norm, ffn_norm = block.mlstm_layer, block.ffn, block.norm_mlstm, block.norm_ffn
    shared = getattr(layer, "context_group", None) is not None  # a sequence split over ranks
    if torch.compiler.is_compiling() or layer.kernel != "flash" or shared or _as_they_are(block) != split:
        return None, None
    gates = layer.projections("ifgate_preact")
    norms = [each._own() for each in (norm, layer.multihead_norm, ffn_norm)]
    first = [layer.out_proj, *layer.projections("qkv_opreact")]
    second = [ffn.proj_down, *ffn.projections("proj_up_gate_z")]
    if any(bias is not None for _, bias in norms) or any(part.bias is not None for part in (*first, *second)):
        return None, None
    own, head, ffn_own = (weight for weight, _ in norms)
    weights, gate_weights, gate_biases, ffn_weights = (
        [p.to_local() for p in parts]
        for parts in ([m.weight for m in first], [m.weight for m in gates], [m.bias for m in gates],
                      [m.weight for m in second])
    )  # fmt: skip
    tensors = (own, head, *weights, *gate_weights, *gate_biases)
    if any(t.dtype != x.dtype for t in (*tensors, ffn_own, *ffn_weights)):
        return None, None
    numbers = (
        norm.eps, layer.eps, layer.multihead_norm.eps, layer.gate_soft_cap, _common.chunk_size_or_0(layer.chunk_size),
        layer.keep_states,
    )  # fmt: skip
    sizes = layer.num_heads, layer.qk_dim
    return (
        residual.MlstmHalf(tensors, (len(first) - 1, len(gates)), sizes, numbers, ranks),
        residual.FeedForwardHalf((ffn_own, *ffn_weights), ffn_norm.eps, ranks),
    )


def _as_they_are(block: nn.Module) -> list[Any]:
    """Of each module within a block, what tells whether it was exchanged or is looked at."""
    return [
        (type(part), *(tuple(own[name]) for name in _LOOKED_AT), "forward" in own)
        for _, part in block.named_modules()
        if part is not block and (own := vars(part)) is not None
    ]


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
