"""Context parallel: one sequence over ranks, each with a piece of it (docs/context_parallel.md).

An mLSTM's piece changes the state before it by a weight and a sum (:func:`flash_xlstm.ops.mlstm_state`). So the ranks
make their pieces' states at once, gather them, and each makes its own initial state of those before it. The backward
goes the same way from the last rank to the first, with the gradients of the ranks' initial states.
"""

from __future__ import annotations

import functools
import math
import weakref
from collections.abc import Sequence
from typing import Any, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch import distributed as dist
from torch.autograd.function import once_differentiable
from torch.distributed.device_mesh import DeviceMesh

from flash_xlstm import ops
from flash_xlstm.models import packing
from flash_xlstm.nn import block_stack, mLSTMLayer
from flash_xlstm.ops import _common
from flash_xlstm.ops.mlstm import MlstmState, keeps_for, mlstm_initial_backward, mlstm_remaining_backward
from flash_xlstm.ops.mlstm_state import mlstm_piece, piece_floats

Group: TypeAlias = dist.ProcessGroup | DeviceMesh
# torch 2.13 renamed them.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
# More ranks than these exchange in two steps: within nodes of at most as many, then between nodes.
_NODE = 8


# Compiled, a rank's backward might repeat a collective that another rank's does not: the ranks' graphs differ.
@torch.compiler.disable(reason="context parallel exchanges states between ranks")
def mlstm(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    i: Tensor,
    f: Tensor,
    *,
    group: Group,
    initial_state: MlstmState | None = None,
    scale: float | None = None,
    eps: float = 1e-6,
    gate_soft_cap: float | None = None,
    chunk_size: int | None = None,
    cu_seqlens: Tensor | None = None,
    continues: bool = True,
    return_final_state: bool = False,
    keep_states: bool = True,
) -> Tensor | tuple[Tensor, MlstmState]:
    """:func:`flash_xlstm.ops.mlstm` over a sequence of which each rank of `group` has a piece, in the order of ranks.

    Every rank must call it, and run its backward if one does: forward and backward exchange states. Pieces may differ
    in length; batch, heads, dqk, dv, the options and what needs gradients may not. torch.compile runs it as it is,
    between two graphs.

    Args:
        q, k, v, i, f, scale, eps, gate_soft_cap, chunk_size, keep_states: this rank's piece and the options, as for
            :func:`flash_xlstm.ops.mlstm`.
        group: the ranks that share the sequence: a process group, or a device mesh of one dimension.
        initial_state: ``(c, n, m)`` before the first rank's first token. Only the first rank reads it and has its
            gradient; elsewhere it may be the same or None, and its gradient is 0. With `cu_seqlens`: one row for each
            of this rank's sequences, whichever rank it is; the row of one that goes on from the rank before is not
            read.
        cu_seqlens: (num_seqs + 1,) int32 offsets of the sequences in this rank's piece; batch must be 1. The last
            sequence goes on on the next rank, unless that says otherwise.
        continues: whether this rank's first sequence goes on from the last one of the rank before. On the first rank
            it means nothing. An empty first sequence (offsets 0, 0, ...) says the same as False: the sequence that
            goes on has no token here.
        return_final_state: also return the final state. Without `cu_seqlens` it is that of the whole sequence, the same
            on every rank; gradients into any rank's copy add up. With `cu_seqlens` it is the state after each
            sequence's last token on this rank.

    Returns:
        h (batch, seq, heads, dv) of this rank's piece, in the dtype of q; with `return_final_state`,
        ``(h, (c, n, m))``.

    Raises:
        ValueError, TypeError: as :func:`flash_xlstm.ops.mlstm`; `continues` is False without `cu_seqlens`, or `group`
            is no group that this process is in. The other ranks learn of one rank's error by the group's timeout.
    """
    group = group_of(group)
    _common.check_flag("continues", continues)
    if cu_seqlens is None and not continues:
        raise ValueError("continues is False; without cu_seqlens, which tells where sequences begin, it must be True")
    _common.check_flag("return_final_state", return_final_state)
    _common.check_flag("keep_states", keep_states)
    rank, size = _place(group)
    _check_piece(q, k, v, i, f)
    if size == 1:
        return ops.mlstm(
            q, k, v, i, f, initial_state=initial_state, scale=scale, eps=eps, gate_soft_cap=gate_soft_cap,
            chunk_size=chunk_size, cu_seqlens=cu_seqlens, return_final_state=return_final_state,
            keep_states=keep_states,
        )  # fmt: skip
    q, k, v = _common.autocast(q, k, v)
    options = scale, eps, gate_soft_cap, _common.chunk_size_or_0(chunk_size)
    given = tuple(initial_state) if isinstance(initial_state, (tuple, list)) else ()
    keeps = keep_states and keeps_for((q, k, v, i, f, *given))
    common = q, k, v, i, f, initial_state, group, rank, size, options, keeps, return_final_state
    return _whole(*common) if cu_seqlens is None else _packed(*common, cu_seqlens, continues)


def slstm(*args: Any, **kwargs: Any) -> Any:
    """The sLSTM cannot be split over a sequence.

    Raises:
        NotImplementedError: always.
    """
    raise NotImplementedError(
        "the sLSTM is sequential: a step needs h of the step before through the recurrent weights, so that a sequence "
        "cannot be split over ranks. Split its batch or its heads, or take mLSTM blocks alone"
    )


def set_group(model: nn.Module, group: Group | None) -> nn.Module:
    """Has every mLSTM of the 7B's architecture in `model` share its sequences over `group`; None undoes it.

    Each rank then calls the model with its piece of every sequence (:func:`shard` cuts a batch), in training with
    ``shift_labels``. Nothing else of this architecture looks beyond a token. Gradients of parameters are each rank's
    share: their sum over the group is the whole. A cache that the model returns is that after the whole sequence, on
    every rank. Before single tokens are generated from it, the group must be None again.

    Args:
        model: :class:`~flash_xlstm.models.xLSTMForCausalLM`, or any module with
            :class:`~flash_xlstm.nn.mLSTMLayer` in it. Changed in place.
        group: as for :func:`mlstm`.

    Returns:
        `model`.

    Raises:
        ValueError: `model` has no such layer, or one that cannot be split over a sequence: an sLSTM, which is
            sequential, an mLSTM of the block stack, whose convolution looks at tokens of the rank before, or one with
            another kernel than "flash". Nothing is changed then.
        TypeError, ValueError: as :func:`group_of`.
    """
    group = None if group is None else group_of(group)
    layers = []
    for name, module in model.named_modules():
        if isinstance(module, (block_stack.sLSTMLayer, block_stack.mLSTMLayer)) and group is not None:
            why = "sequential" if isinstance(module, block_stack.sLSTMLayer) else "behind a causal convolution"
            raise ValueError(
                f"{name} is a {type(module).__name__} of the block stack, which is {why}: it cannot be split over a "
                "sequence; split its batch"
            )
        if isinstance(module, mLSTMLayer):
            if module.kernel != "flash" and group is not None:
                raise ValueError(
                    f"{name} has kernel {module.kernel!r}; to share sequences over ranks it must be 'flash'"
                )
            layers.append(module)
    if not layers:
        raise ValueError(f"model is a {type(model).__name__} without an mLSTMLayer; there is nothing to split")
    for layer in layers:
        layer.context_group = group
        run: Any = ops.mlstm if group is None else functools.partial(mlstm, group=group)
        layer._mlstm = functools.partial(run, chunk_size=layer.chunk_size)
    return model


def shard(batch: dict[str, Any], group: Group, pieces: Sequence[int] | None = None) -> dict[str, Any]:
    """This rank's piece of a batch that every rank of `group` has whole, for a model with :func:`set_group`.

    Args:
        batch: what one process would give the model: ``input_ids`` (batch, seq), with any of ``labels`` or
            ``shift_labels``, ``attention_mask``, and what tells documents that are packed into the rows
            (``cu_seq_lens_q``, ``seq_idx``, ``position_ids`` or numbers in the mask), as for
            :meth:`~flash_xlstm.models.xLSTMModel.forward`. On the CPU: offsets on CUDA are waited for.
        group: as for :func:`mlstm`.
        pieces: how many tokens each rank takes of a row, at least 1 each; with documents of all rows one after the
            other. Default: as even as can be.

    Returns:
        Arguments for the model: ``input_ids``; ``shift_labels`` where there are labels, each token's own successor,
        also across the border to the next rank, -100 where none counts; ``num_items_in_batch``, the labels that count
        in all pieces, so that the ranks' losses add up to the mean over all. Where the ranks' gradients are averaged
        (DDP, FSDP) and not summed, divide it by the number of ranks. ``attention_mask``, if there is one. With
        documents: rows one after the other as one, and ``cu_seq_lens_q``, whose first document is what goes on from the
        rank before (empty where none does).

    Raises:
        TypeError, ValueError: `batch` has other keys or wrong ones, or `pieces` do not make the sequence.
    """
    group = group_of(group)
    rank, size = dist.get_rank(group), dist.get_world_size(group)
    batch = {name: t for name, t in batch.items() if t is not None}
    ids = batch.pop("input_ids", None)
    if not isinstance(ids, Tensor) or ids.dim() != 2:
        raise ValueError("batch has no input_ids of (batch, seq); it must have them")
    tokens = {"input_ids": ids}
    labels, mask, position_ids = (batch.pop(name, None) for name in ("labels", "attention_mask", "position_ids"))
    following = batch.pop("shift_labels", None)
    for name, t in {"labels": labels, "shift_labels": following, "attention_mask": mask}.items():
        if t is not None and t.shape != ids.shape:
            raise ValueError(f"{name} has shape {tuple(t.shape)}; it must be that of input_ids, {tuple(ids.shape)}")
    unknown = [name for name in batch if name not in packing.ARGUMENTS]
    if unknown:
        raise TypeError(f"batch has {unknown[0]!r}, which is not known how to cut; leave it out")
    padding = None if mask is None else mask == 0
    offsets = packing.offsets(batch, position_ids, mask, padding, ids)
    if following is None and labels is not None:
        if padding is not None:
            labels = labels.masked_fill(padding, -100)
        if offsets is not None:
            labels = labels.masked_fill(packing.first_tokens(offsets, *ids.shape), -100)
        following = F.pad(labels[:, 1:], (0, 1), value=-100)
    if following is not None:
        tokens["shift_labels"] = following
    if padding is not None:
        tokens["attention_mask"] = (~padding).long()
    if offsets is not None:
        tokens = {name: t.reshape(1, -1) for name, t in tokens.items()}
    seq = tokens["input_ids"].shape[1]
    if pieces is None:
        pieces = [seq // size + (r < seq % size) for r in range(size)]
    if len(pieces) != size or min(pieces) < 1 or sum(pieces) != seq:
        raise ValueError(f"pieces are {list(pieces)}; they must be {size} of at least 1 token, {seq} in all")
    first = sum(pieces[:rank])
    stop = first + pieces[rank]
    cut: dict[str, Any] = {name: t[:, first:stop].contiguous() for name, t in tokens.items()}
    if following is not None:
        cut["num_items_in_batch"] = (following != -100).sum()
    if offsets is not None:
        local = (offsets.clamp(first, stop) - first).unique()
        if rank > 0 and bool((offsets == first).any()):
            local = F.pad(local, (1, 0))
        cut["cu_seq_lens_q"] = local.to(torch.int32)
    return cut


def group_of(group: Group) -> dist.ProcessGroup:
    """The process group of a group or of a device mesh of one dimension.

    Raises:
        TypeError, ValueError: it is neither, or this process is not in it.
    """
    if isinstance(group, DeviceMesh):
        if group.ndim != 1:
            raise ValueError(f"group is a mesh of {group.ndim} dimensions; it must have one: take mesh['cp']")
        group = group.get_group()
    if not isinstance(group, dist.ProcessGroup):
        raise TypeError(f"group is a {type(group).__name__}; it must be a ProcessGroup or a DeviceMesh")
    if _place(group)[0] < 0:
        raise ValueError("group is one that this process is not in; it must be one of its own")
    return group


def _whole(q, k, v, i, f, initial_state, group, rank, size, options, keeps, wants_last):
    is_read = wants_last or rank < size - 1
    piece = _piece(k, v, i, f, options, is_read, rank == 0 and initial_state is None)  # first: the others wait for it
    if initial_state is None:
        found = _Mlstm.apply(group, wants_last, options, keeps, None, piece, None, None, None, q, k, v, i, f)
        return (found[0], found[1:]) if wants_last else found
    state, dtype = _initial(k, v, initial_state, k.shape[0])
    if rank == 0:
        piece = _after(state, piece)
    found = _Mlstm.apply(group, wants_last, options, keeps, None, piece, *state, q, k, v, i, f)
    if not wants_last:
        return found
    h, c, n, m = found
    return h, (c.to(dtype), n, m)


def _packed(q, k, v, i, f, initial_state, group, rank, size, options, keeps, wants_last, cu_seqlens, continues):
    if not isinstance(cu_seqlens, Tensor) or cu_seqlens.dim() != 1 or cu_seqlens.shape[0] < 2:
        was = f"of shape {tuple(cu_seqlens.shape)}" if isinstance(cu_seqlens, Tensor) else f"{cu_seqlens!r:.80}"
        raise ValueError(f"cu_seqlens is {was}; it must be a tensor of at least 2 offsets, (num_seqs + 1,)")
    state, dtype = _initial(k, v, initial_state, cu_seqlens.shape[0] - 1)
    is_cut = not continues and rank > 0
    if is_cut:  # the sequence that goes on has no token here
        cu_seqlens = F.pad(cu_seqlens, (1, 0))
        state = tuple(_pad_rows(t, 1) for t in state)
    several = cu_seqlens.shape[0] > 2
    is_read = rank < size - 1
    last_i, last_f = i, f
    if several and is_read:  # the last sequence alone: the tokens before it are made padding
        before = torch.arange(k.shape[1], device=k.device) < cu_seqlens[-2]
        last_i, last_f = i.masked_fill(before[:, None], -torch.inf), f.masked_fill(before[:, None], torch.inf)
    begins = several or rank == 0  # here: what came before this rank ends with its first sequence
    piece = _piece(k, v, last_i, last_f, options, is_read, begins and initial_state is None)
    if begins:
        if initial_state is not None:
            piece = _after(tuple(t[-1:] for t in state), piece)
        with torch.no_grad():
            _parts(piece, (k.shape[0], *k.shape[2:], v.shape[-1]))[3].fill_(-torch.inf)
    found = _Mlstm.apply(group, wants_last, options, keeps, cu_seqlens, piece, *state, q, k, v, i, f)
    if not wants_last:
        return found
    h, c, n, m = found
    c, n, m = (t[1:] if is_cut else t for t in (c, n, m))
    return h, (c.to(dtype), n, m)


def _check_piece(q: Tensor, k: Tensor, v: Tensor, i: Tensor, f: Tensor) -> None:
    """What the ops check as well, but before anything is exchanged, on ranks too that need no state of their own."""
    for name, t in {"q": q, "k": k, "v": v, "i": i, "f": f}.items():
        if not isinstance(t, Tensor):
            raise TypeError(f"{name} is of type {type(t).__name__}; it must be a tensor")
        sizes, dims = "(batch, seq, heads)", 3
        if name in ("q", "k", "v"):
            sizes, dims = f"(batch, seq, heads, {'dv' if name == 'v' else 'dqk'})", 4
        if t.dim() != dims or t.shape[:3] != q.shape[:3] or (name == "k" and t.shape != q.shape):
            raise ValueError(f"{name} has shape {tuple(t.shape)}; it must be {sizes}, as q, {tuple(q.shape)}")
        if t.dtype not in (torch.float32, torch.bfloat16, torch.float16):
            raise TypeError(f"{name} has dtype {str(t.dtype)[6:]}; it must be float32, bfloat16 or float16")
    if q.shape[1] < 1:
        raise ValueError("q has seq 0; every rank's piece must have at least 1 token")


def _initial(k: Tensor, v: Tensor, given: MlstmState | None, rows: int) -> tuple[MlstmState, torch.dtype]:
    """The initial state in float32, zeros by default, and the dtype of the c to return."""
    heads, dqk, dv = k.shape[2], k.shape[3], v.shape[-1]
    sizes = {"c": (rows, heads, dqk, dv), "n": (rows, heads, dqk), "m": (rows, heads)}
    if given is None:
        c, n, m = (torch.zeros(size, dtype=torch.float32, device=k.device) for size in sizes.values())
        return (c, n, m), torch.float32
    state = dict(zip("cnm", _common.unpack_state("initial_state", given), strict=True))
    for name, t in state.items():
        if not isinstance(t, Tensor) or t.shape != sizes[name]:
            was = f"of shape {tuple(t.shape)}" if isinstance(t, Tensor) else f"{t!r:.80}"
            raise ValueError(f"initial_state {name} is {was}; it must be a tensor of shape {sizes[name]}")
        if t.dtype != torch.float32 and not (name == "c" and t.dtype == torch.bfloat16):
            raise TypeError(f"initial_state {name} has dtype {str(t.dtype)[6:]}; it must be float32")
    c, dtype = _common.float32_c(state["c"])
    return (c, state["n"], state["m"]), dtype  # type: ignore[return-value]


@torch.no_grad()
def _piece(k: Tensor, v: Tensor, i: Tensor, f: Tensor, options: tuple[Any, ...], is_read: bool, begins: bool) -> Tensor:
    """What :func:`_parts` splits, of this rank's tokens: behind a state without weight; with `begins` behind one of
    zeros, m among them. Where no rank reads it, anything."""
    if is_read:
        return mlstm_piece(k, v, i, f, *options[2:], begins)
    batch, _, heads, dqk = k.shape
    return k.new_empty(piece_floats(batch, heads, dqk, v.shape[-1]), dtype=torch.float32)


def _parts(piece: Tensor, c_shape: Sequence[int]) -> list[Tensor]:
    """Views of c, n, m and log decay of one piece, (floats,), or of several, (pieces, floats)."""
    first = piece.storage_offset()
    layouts = _layouts(tuple(c_shape), piece.shape, piece.stride())
    return [piece.as_strided(shape, stride, first + at) for shape, stride, at in layouts]


@functools.lru_cache(maxsize=64)
def _layouts(
    c_shape: tuple[int, ...], shape: tuple[int, ...], stride: tuple[int, ...]
) -> list[tuple[tuple[int, ...], tuple[int, ...], int]]:
    """Shape, stride and offset of each part."""
    layouts, at = [], 0
    for dims in (4, 3, 2, 2):
        sizes = c_shape[:dims]
        inner = [math.prod(sizes[d + 1 :]) for d in range(dims)]
        layouts.append(((*shape[:-1], *sizes), (*stride[:-1], *inner), at))
        at += math.prod(sizes)
    return layouts


@torch.no_grad()
def _after(state: MlstmState, piece: Tensor) -> Tensor:
    """The state after a piece, in the place of the piece's own."""
    c, n, m = state
    piece_c, piece_n, piece_m, decay = _parts(piece, c.shape)
    last = torch.maximum(decay + m, piece_m)
    kept, added = torch.exp(decay + m - last), torch.exp(piece_m - last)
    piece_c.mul_(added[..., None, None]).add_(kept[..., None, None] * c)
    piece_n.mul_(added[..., None]).add_(kept[..., None] * n)
    piece_m.copy_(last)
    return piece


class _Mlstm(torch.autograd.Function):
    """h, and with `wants_last` the final state: with cu_seqlens of each sequence here, else of the whole.

    piece: c, n, m and log decay of this rank's last sequence. Where it begins here, c, n, m are a state already, which
    no earlier one changes, and the log decay is -inf; the first rank's is not read. c, n, m: of each sequence here; of
    the first one they are read on the first rank alone. Without cu_seqlens they are None elsewhere, or ask for zeros.

    Backward: a rank's h has gradients into c and n of the state before it, and through eps into its m, apart from what
    m means to c and n. They go to the ends of all pieces before: those of c and n weighted as these states were, that
    of m as far as no token between made m anew. Each rank then has the gradient of its own final state, and the mlstm's
    backward does the rest.
    """

    @staticmethod
    def forward(ctx, group, wants_last, options, keeps, cu_seqlens, piece, c, n, m, q, k, v, i, f):
        rank, size = _place(group)
        shape = k.shape[0], *k.shape[2:], v.shape[-1]
        node, between = _nodes(group)
        # Waited for on the first rank too: to go on beside it gains nothing (docs/experiments.md).
        pieces = _gathered(piece, node)
        # Up to the mlstm's first kernel the GPU waits for the host, so that what can come behind it does.
        place = rank if between is None else _place(node)[0]
        if between is None:
            nodes, ahead = None, pieces[:place]
        else:
            c_of, n_of, m_of, decay = _parts(pieces, shape)
            sums = *_state_after((c_of, n_of, m_of, decay)), decay.sum(0)
            nodes = _gathered(torch.cat([t.flatten() for t in sums]), between, piece.shape[0])
            ahead = torch.cat((nodes[: _place(between)[0]], pieces[:place]))

        state = c, n, m
        if rank > 0:
            before: Any = _state_after(_parts(ahead, shape)) if ahead.shape[0] > 1 else _parts(ahead[0], shape)[:3]
            state = before if c is None else tuple(_in_front(a, b) for a, b in zip(before, state, strict=True))
        with torch._C._AutoDispatchBelowAutograd():
            h, kept, *last = torch.ops.flash_xlstm.mlstm.default(
                q, k, v, i, f, *state, cu_seqlens, *options, wants_last or rank < size - 1, keeps
            )
        whole: tuple[Tensor, ...] = ()
        if wants_last and cu_seqlens is None:
            whole = _state_after(_parts(pieces if nodes is None else nodes, shape))
        ctx.group, ctx.wants_last, ctx.options, ctx.has_state = group, wants_last, options, c is not None
        if ahead.shape[0] == 1 and size > 2:  # do not keep the other pieces
            state = tuple(t.clone() for t in state)
        scalars = torch.stack(_parts(pieces, shape)[2:])
        of_nodes = None if nodes is None else torch.stack(_parts(nodes, shape)[2:])
        kept_tensors = _common.kept_h(q, h), kept, scalars, of_nodes
        ctx.save_for_backward(q, k, v, i, f, *state, cu_seqlens, *kept_tensors, *last, *whole)
        return (h, *(whole or last)) if wants_last else h

    @staticmethod
    @once_differentiable
    def backward(ctx, dh, *into_last):
        saved = ctx.saved_tensors  # once: checkpointing makes them again
        *inputs, scalars, of_nodes = saved[:13]
        last, whole = saved[13:16], saved[16:]
        k, v, c = inputs[1], inputs[2], inputs[5]
        rank, size = _place(ctx.group)
        batch = scalars.shape[2]
        rows, shape = batch if c is None else c.shape[0], (batch, *k.shape[2:], v.shape[-1])
        own: tuple[Any, ...] = into_last if into_last and not whole else (None, None, None)
        # The first part makes what the ranks before need, the second goes on with what those behind sent.
        dc, dn, into_m, is_open, dq, begun = mlstm_initial_backward(dh, *own[:2], *inputs, *ctx.options)
        if own[2] is not None and c is not None:
            into_m = into_m + is_open * (own[2] - _inner(last, *own[:2]))
        sent = [(dc[:batch], dn[:batch], into_m[:batch])]
        if whole:  # as if a rank behind the last read the final state
            dc, dn, dm = into_last
            sent.append((dc, dn, dm - _inner(whole, dc, dn)))
        got = (_received if of_nodes is None else _received_in_nodes)(ctx.group, shape, scalars, of_nodes, sent)
        if rank < size - 1 or whole:
            dc, dn, dm, _ = _parts(got, shape)
            dm = dm + _inner([t[-batch:] for t in last], dc, dn)
            more = (_pad_rows(t, rows - batch) for t in (dc, dn, dm)) if rows > batch else (dc, dn, dm)
            own = tuple(a if b is None else a + b for a, b in zip(more, own, strict=True))
        whole_dq, dk, dv, di, df, *state = mlstm_remaining_backward(dh, *own, *inputs, *ctx.options, begun)
        dq = dq if begun.numel() > 0 else whole_dq
        if not ctx.has_state:
            state = [None] * 3
        elif rank > 0:  # of the sequence that goes on nothing was read
            for t in state:
                t[:batch] = 0.0
        return None, None, None, None, None, None, *state, dq, dk, dv, di, df


_places: weakref.WeakKeyDictionary[dist.ProcessGroup, tuple[int, int]] = weakref.WeakKeyDictionary()


def _place(group: dist.ProcessGroup) -> tuple[int, int]:
    """This process' rank in the group, and how many there are. torch looks both up anew at every question."""
    found = _places.get(group)
    if found is None:
        found = _places[group] = dist.get_rank(group), dist.get_world_size(group)
    return found


_nodes_of: weakref.WeakKeyDictionary[dist.ProcessGroup, tuple] = weakref.WeakKeyDictionary()


def _nodes(group: dist.ProcessGroup) -> tuple[dist.ProcessGroup, dist.ProcessGroup | None]:
    """The group of this rank's node, of consecutive ranks, and that of the ranks at its place in all nodes; or the
    whole group and None, where they are few or no number of 2 to `_NODE` ranks divides them."""
    at, size = _place(group)
    count = next((n for n in range(_NODE, 1, -1) if size % n == 0), 1)
    if size <= _NODE or count == 1:
        return group, None
    if group not in _nodes_of:
        ranks = dist.get_process_group_ranks(group)
        first, place = at // count * count, at % count
        _nodes_of[group] = tuple(
            dist.new_group(members, use_local_synchronization=True)
            for members in (ranks[first : first + count], ranks[place::count])
        )
    return _nodes_of[group]


def _gathered(own: Tensor, group: dist.ProcessGroup, floats: int | None = None) -> Tensor:
    """`own` of every rank, (ranks, floats); `floats` more than it has are left open."""
    floats = own.numel() if floats is None else floats
    every = own.new_empty(_place(group)[1], floats)
    if floats > 0:
        own = own if own.numel() == floats else F.pad(own.flatten(), (0, floats - own.numel()))
        _all_gather(every.view(-1), own.reshape(-1), group=group)
    return every


def _state_after(pieces: Sequence[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """c, n and m behind the last of some pieces, whose :func:`_parts` are given."""
    c, n, m, decay = pieces
    if m.shape[0] == 1:  # its weight is 1
        return c[0], n[0], m[0]
    weights, top = _weights(m, decay)
    return _times(c, weights[..., None, None]).sum(0), _times(n, weights[..., None]).sum(0), top


def _received(group, shape, scalars, of_nodes, sent) -> Tensor:
    """The gradient of this rank's final state from all ranks behind it."""
    rank, size = _place(group)
    to_all = torch.zeros(size, piece_floats(*shape), dtype=torch.float32, device=scalars.device)
    for upto, of_state in zip((rank, size), sent, strict=False):
        if upto == 1:  # its weight is 1
            for a, b in zip(_parts(to_all[0], shape), of_state, strict=False):
                a += b
        elif upto > 1:
            _add(_parts(to_all[:upto], shape), of_state, *_shares(scalars, upto))
    got = torch.empty_like(to_all[0])
    if got.numel() > 0:
        _reduce_scatter(got, to_all.view(-1), group=group)
    return got


def _received_in_nodes(group, shape, scalars, of_nodes, sent) -> Tensor:
    """The same in two steps. A node's ranks gather what they would send. Each sums from it what its own final state
    gets, and what the state before the node gets; the nodes gather the latter."""
    node, between = _nodes(group)
    (place, ranks), (number, nodes) = _place(node), _place(between)
    floats = piece_floats(*shape)
    own = torch.cat([F.pad(torch.cat([t.flatten() for t in x]), (0, floats))[:floats] for x in sent])
    every = _gathered(own, node).view(ranks, len(sent), floats)
    front = int(number > 0)  # the state before the node is a piece in front of its own
    if front:
        before = _weights(*of_nodes[:, :number])[1]
        scalars = torch.cat((torch.stack((before, torch.zeros_like(before)))[:, None], scalars), 1)

    got, at_end = torch.zeros(2, floats, dtype=torch.float32, device=scalars.device)
    to_front = torch.zeros_like(every[0])
    for r in range(ranks):
        of_state = _parts(every[r, 0], shape)[:3]
        shares = _shares(scalars, r + front) if r + front > 0 else ()
        if front:
            _add(_parts(to_front[0], shape), of_state, *(t[0] for t in shares))
        if place < r:
            _add(_parts(got, shape), of_state, *(t[place + front] for t in shares))
    to_front[1:] = every[:, 1:].sum(0)
    of_all = _gathered(to_front.flatten(), between).view(nodes, len(sent), floats)

    # What the state behind the node gets, and of that this rank's.
    behind = [(other, of_all[other, 0]) for other in range(number + 1, nodes)]
    behind += [(nodes, x) for x in of_all[:, 1:].sum(0)]
    for upto, of_state in behind:
        _add(_parts(at_end, shape), _parts(of_state, shape)[:3], *(t[number] for t in _shares(of_nodes, upto)))
    if behind:
        shares = _shares(scalars, ranks + front)
        _add(_parts(got, shape), _parts(at_end, shape)[:3], *(t[place + front] for t in shares))
    return got


def _in_front(a: Tensor, b: Tensor) -> Tensor:
    """The rows of b, the first ones replaced by those of a."""
    return a if a.shape == b.shape else torch.cat((a, b[a.shape[0] :]))


def _pad_rows(t: Tensor, count: int) -> Tensor:
    """`count` rows of zeros before those of t."""
    return F.pad(t, (0, 0) * (t.dim() - 1) + (count, 0))


def _inner(state: Sequence[Tensor], dc: Tensor, dn: Tensor) -> Tensor:
    return (state[0] * dc).flatten(2).sum(-1) + (state[1] * dn).sum(-1)


def _add(to: Sequence[Tensor], of_state: Sequence[Tensor], weights: Tensor, goes_on: Tensor) -> None:
    """Adds a state's gradients dc, dn, into_m to those at the ends of pieces before it, by their :func:`_shares`."""
    dc, dn, into_m = of_state
    to[0].add_(_times(dc, weights[..., None, None]))
    to[1].add_(_times(dn, weights[..., None]))
    to[2].add_(torch.where(goes_on == 0, 0.0, into_m))


def _shares(scalars: Tensor, upto: int) -> tuple[Tensor, Tensor]:
    """Of the state before piece `upto`, for each piece before it, by their m and log decay: the weight of c and n at
    the piece's end in it, and whether all pieces between are open: no token of theirs makes m anew."""
    m, decay = scalars[:, :upto].double()
    if upto == 1:
        return torch.ones_like(m, dtype=torch.float32), torch.ones_like(m)
    ends, is_open = [m[0]], [torch.zeros_like(m[0])]  # m at the pieces' ends
    for r in range(1, upto):
        carried = decay[r] + ends[-1]
        ends.append(torch.maximum(carried, m[r]))
        is_open.append((carried > m[r]).double())
    weights, _ = _weights(torch.stack(ends), decay)
    behind = torch.stack([*is_open[1:], torch.ones_like(m[0])])
    return weights, behind.flip(0).cumprod(0).flip(0)


def _weights(m: Tensor, decay: Tensor) -> tuple[Tensor, Tensor]:
    """Of pieces' m and log decay, (pieces, batch, heads): the weight of each piece's state in the state after the last,
    and this state's m."""
    behind = F.pad(decay[1:].double().flip(0).cumsum(0).flip(0), (0, 0, 0, 0, 0, 1))  # in the pieces after each
    logs = behind + m.double()
    top = logs.amax(0).float()  # weights are relative to the float32 m, so that its rounding does not matter
    return torch.exp(logs - top).float(), top


def _times(states: Tensor, weights: Tensor) -> Tensor:
    """A weight of 0 takes no part, whatever the state holds."""
    return torch.where(weights == 0, 0.0, states * weights)
