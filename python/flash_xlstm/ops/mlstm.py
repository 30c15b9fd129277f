"""The mLSTM: matrix memory with exponential gates (xLSTM, arXiv 2405.04517), chunkwise (arXiv 2503.14376)."""

from __future__ import annotations

import torch
import torch.autograd.forward_ad as forward_ad
from torch import Tensor

from flash_xlstm import _build
from flash_xlstm.ops import _common, _errors

MlstmState = tuple[Tensor, Tensor, Tensor]


def mlstm(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    i: Tensor,
    f: Tensor,
    *,
    initial_state: MlstmState | None = None,
    scale: float | None = None,
    eps: float = 1e-6,
    gate_soft_cap: float | None = None,
    chunk_size: int | None = None,
    cu_seqlens: Tensor | None = None,
    return_final_state: bool = False,
    keep_states: bool = True,
) -> Tensor | tuple[Tensor, MlstmState]:
    """The mLSTM over a sequence, with exact gradients.

    Per head, with ``lf = logsigmoid(f)`` (equations 19 to 27 of arXiv 2405.04517, stabilized)::

        m_t = max(lf_t + m_{t-1}, i_t)
        c_t = exp(lf_t + m_{t-1} - m_t) c_{t-1} + exp(i_t - m_t) k_t v_t^T
        n_t = exp(lf_t + m_{t-1} - m_t) n_{t-1} + exp(i_t - m_t) k_t
        h_t = scale q_t^T c_t / (max(|scale q_t . n_t|, exp(-m_t)) + eps)

    Args:
        q, k: (batch, seq, heads, dqk); float32, bfloat16 or float16; CPU or CUDA. Any strides, as long as the last
            dimension is contiguous.
        v: (batch, seq, heads, dv), dtype and layout as q.
        i, f: (batch, seq, heads) pre-activations of the input and forget gates; float32 or the dtype of q (both the
            same); any strides. A token with ``i = -inf`` and ``f = +inf`` is padding: the state passes through it
            unchanged and its own k, v, i, f get zero gradients. ``f = -inf`` is not a defined input.
        initial_state: ``(c, n, m)`` before the first token: c (batch, heads, dqk, dv) float32 or bfloat16, n (batch,
            heads, dqk) float32, m (batch, heads) float32. Default: zeros.
        scale: factor of q; default ``dqk ** -0.5``.
        eps: added to the normalizer after the maximum.
        gate_soft_cap: both gates' pre-activations x are replaced by ``gate_soft_cap * tanh(x / gate_soft_cap)``,
            computed in float32 within the kernels. Finite and greater than 0, or None for no cap. Infinite
            pre-activations are unchanged, so that padding remains padding.
        chunk_size: tokens processed together, 1 to 4096; None lets the kernel choose. It changes the speed, and results
            by rounding only. The CUDA kernels have fixed tiles and take it as a hint.
        cu_seqlens: (num_seqs + 1,) int32 offsets of packed sequences, on the device of q: sequence s is tokens
            ``cu_seqlens[s]`` to ``cu_seqlens[s + 1]`` of batch row 0 (batch must be 1); states then have num_seqs in
            place of batch. On CUDA the host does not read the values. Wrong ones give wrong results, but no access
            outside the tensors.
        return_final_state: also return the state after the last token.
        keep_states: where the Hopper kernels or those of a CPU serve and a gradient is needed, the forward leaves the
            states at every 128th token to the backward: ``dqk * dv / 64`` bytes more for each token and head, two
            thirds of q, k, v and h together at 256 x 512. On CPUs they are float32, twice as large; those of fewer than
            65,536 numbers are kept at every 64th token, ``dqk * dv / 16`` bytes: as much as q, k, v and h in bfloat16
            at 128 x 128. False: the backward makes them again.

    Returns:
        h (batch, seq, heads, dv) in the dtype of q; with `return_final_state`, ``(h, (c, n, m))``. The final c has the
        dtype of the initial c (float32 without one).

    Under autocast q, k, v are cast to the autocast dtype; gates and states keep theirs.

    Raises:
        ValueError, TypeError: an argument has a wrong shape, dtype, device, layout or value. The text names it. Nothing
            has run.
    """
    try:
        is_eager = _common.is_eager()
        if not is_eager or torch._C._is_any_autocast_enabled():
            q, k, v = _common.autocast(q, k, v)
        c, n, m = (None, None, None) if initial_state is None else _common.unpack_state("initial_state", initial_state)
        c, state_dtype = _common.float32_c(c)
        inputs = q, k, v, i, f, c, n, m, cu_seqlens
        options = scale, eps, gate_soft_cap, _common.chunk_size_or_0(chunk_size)
        _common.check_flag("keep_states", keep_states)
        if return_final_state is not False:
            _common.check_flag("return_final_state", return_final_state)
            keeps = keep_states and keeps_for(inputs)
            h, _, c_last, n_last, m_last = _mlstm(*inputs, *options, True, keeps)
            return h, (c_last.to(state_dtype), n_last, m_last)
        if not is_eager:
            return _mlstm(*inputs, *options, False, keep_states and keeps_for(inputs))[0]
        if forward_ad._current_level >= 0:
            _common.refuse_forward_mode("mlstm", inputs)
        if _common.needs_gradients(inputs):
            return _Mlstm.apply(*inputs, options, keep_states)
        return _mlstm_h(*inputs, *options)
    except Exception as error:
        if torch.compiler.is_compiling():
            raise
        raise _errors.explain(error, mlstm, locals()) from None


def mlstm_step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    i: Tensor,
    f: Tensor,
    state: MlstmState,
    *,
    state_indices: Tensor | None = None,
    scale: float | None = None,
    eps: float = 1e-6,
    gate_soft_cap: float | None = None,
    settled_state: bool = False,
) -> Tensor:
    """One token of the mLSTM for every row of a batch; updates `state` in place.

    The recurrence is that of :func:`mlstm`.

    Args:
        q, k: (batch, heads, dqk); v: (batch, heads, dv). float32, bfloat16 or float16; CPU or CUDA; last dimension
            contiguous.
        i, f: (batch, heads) gate pre-activations; float32 or the dtype of q.
        state: ``(c, n, m)``: c (batch, heads, dqk, dv) float32 or bfloat16, n (batch, heads, dqk) float32, m (batch,
            heads) float32. Any stride between the first dimension's slots, as in parts of a page of memory; each slot
            contiguous. On CUDA slots of c that begin at multiples of 16 bytes are read faster. **Written in place.**
        state_indices: (batch,) int32, or None. `state` is then a pool with any number of slots in place of batch. Row b
            uses slot ``state_indices[b]``; -1 leaves a row out (its h is 0). Slots must be distinct. On CUDA an index
            outside the pool accesses no memory and gives NaN.
        scale: factor of q; default ``dqk ** -0.5``.
        eps: added to the normalizer after the maximum.
        gate_soft_cap: as in :func:`mlstm`.
        settled_state: a promise that no kernel which may still be running writes `state`. GPUs from Hopper on then
            begin to read c of few rows while the previous kernel runs. The promise concerns other libraries' kernels
            with programmatic dependent launch, which let the next kernel start before they end, and the last few calls
            of this package on the stream. After a step with this promise it concerns that step only.

    On CUDA, dqk is at most 8,192.

    Returns:
        h (batch, heads, dv) in the dtype of q.

    Raises:
        ValueError, TypeError: as :func:`mlstm`. The state is unchanged.
        RuntimeError: a gradient is needed, and the step has none. Use ``torch.no_grad()``, or :func:`mlstm` with seq 1
            and ``return_final_state=True``.
    """
    try:
        _common.check_flag("settled_state", settled_state)
        q, k, v = _common.autocast(q, k, v)
        c, n, m = _common.unpack_state("state", state)
        if c is None or n is None or m is None:
            raise _missing(c, n, m)
        if torch.is_grad_enabled() and any(t.requires_grad for t in (q, k, v, i, f, c, n, m)):
            raise RuntimeError(
                "mlstm_step has no gradient, but an argument requires one. Call it under torch.no_grad(), or use "
                "mlstm(..., initial_state=state, return_final_state=True) with seq 1, which is differentiable."
            )
        return _mlstm_step(q, k, v, i, f, c, n, m, state_indices, scale, eps, gate_soft_cap, settled_state)
    except Exception as error:
        if torch.compiler.is_compiling():
            raise
        raise _errors.explain(error, mlstm_step, locals()) from None


def mlstm_prefill(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    i: Tensor,
    f: Tensor,
    state: MlstmState,
    *,
    state_indices: Tensor,
    cu_seqlens: Tensor | None = None,
    fresh: Tensor | None = None,
    scale: float | None = None,
    eps: float = 1e-6,
    gate_soft_cap: float | None = None,
) -> Tensor:
    """The mLSTM over sequences whose states lie in a pool; updates their slots in place. For inference.

    The recurrence is that of :func:`mlstm`, and so are the results for contiguous slots. The kernels read a sequence's
    initial state from its slot and write its final state there, so c is not gathered and scattered.

    Args:
        q, k, v, i, f: as :func:`mlstm`, (batch, seq, heads, dim) and (batch, seq, heads).
        state: ``(c, n, m)``, a pool with any number of slots in place of batch, as for :func:`mlstm_step`: c (slots,
            heads, dqk, dv) float32 or bfloat16, n (slots, heads, dqk) float32, m (slots, heads) float32. Any stride
            between slots; each slot contiguous. On CUDA slots of c that begin at multiples of 16 bytes take the fastest
            kernels. **Written in place.** torch.compile refuses graph inputs that share memory and are written, as
            parts of one page do: an engine calls this op outside its graphs.
        state_indices: (batch,) int32, with `cu_seqlens` (num_seqs,): the slot of each sequence. Slots must be distinct.
            -1 leaves a sequence out: its h is 0, and no state is read or written. On CUDA an index outside the pool
            accesses no memory and gives NaN in the sequence's h.
        cu_seqlens: offsets of packed sequences, as in :func:`mlstm`. An empty sequence's state is kept.
        fresh: (batch,) or (num_seqs,) bool: True where a sequence starts from zero. What its slot holds, NaN included,
            is then not read. None: no sequence.
        scale: factor of q; default ``dqk ** -0.5``.
        eps: added to the normalizer after the maximum.
        gate_soft_cap: as in :func:`mlstm`.

    Returns:
        h (batch, seq, heads, dv) in the dtype of q.

    Under autocast q, k, v are cast to the autocast dtype; gates and states keep theirs.

    Raises:
        ValueError, TypeError: as :func:`mlstm`. The state is unchanged.
        RuntimeError: a gradient is needed, and this op has none. Use ``torch.no_grad()``, or :func:`mlstm`.
    """
    try:
        q, k, v = _common.autocast(q, k, v)
        c, n, m = _common.unpack_state("state", state)
        if c is None or n is None or m is None:
            raise _missing(c, n, m)
        if torch.is_grad_enabled() and any(t.requires_grad for t in (q, k, v, i, f, c, n, m)):
            raise RuntimeError(
                "mlstm_prefill has no gradient, but an argument requires one. Call it under torch.no_grad(), or use "
                "mlstm(..., initial_state=..., return_final_state=True), which is differentiable."
            )
        return _mlstm_prefill(q, k, v, i, f, c, n, m, state_indices, cu_seqlens, fresh, scale, eps, gate_soft_cap)
    except Exception as error:
        if torch.compiler.is_compiling():
            raise
        raise _errors.explain(error, mlstm_prefill, locals()) from None


def _missing(*state: Tensor | None) -> TypeError:
    missing = next(name for name, t in zip("cnm", state, strict=True) if t is None)
    return TypeError(f"state {missing} is None; it must be a tensor")


def keeps_for(inputs: tuple[Tensor | None, ...]) -> bool:
    """Whether states are worth keeping: for a backward, which an exported program does not have."""
    return _common.needs_gradients(inputs) and not torch.compiler.is_exporting()


def kept_shape(q: Tensor, dv, cu_seqlens: Tensor | None, keep_states: bool, scalars: int = 2) -> tuple:
    """The shape of what the forward keeps for the backward: `scalars` numbers for each token and head (s and m; s; or
    nothing), behind the states, if it keeps these."""
    batch, seq, heads, dqk = (_common.size(q, d) for d in range(4))
    if keep_states and q.device.type == "cpu":
        floats, tokens = _build.kept_states(int(dqk), int(dv))
        chunks = batch * ((seq - 1) // tokens)
        return (chunks * heads * floats + 16 + scalars * batch * seq * heads,)
    floats = _build.kept_floats(q.dtype, int(dqk), int(dv), q.device) if keep_states else 0
    if floats == 0:
        return (2, batch, seq, heads) if scalars == 2 else (scalars * batch, seq, heads)
    chunks = -(-seq // _build.LIMITS["mlstm_kept_tokens"])
    chunks = chunks * batch if cu_seqlens is None else chunks + _common.num_seqs(q, cu_seqlens)
    return (chunks * heads * floats + scalars * batch * seq * heads,)


@_common.register_fake("mlstm_forward")
def _fake(q, k, v, i, f, c, n, m, cu_seqlens, scale, eps, gate_soft_cap, chunk_size, keep_states=False):
    _common.no_mixed_meta(
        q, k=k, v=v, i=i, f=f, cu_seqlens=cu_seqlens,
        **{"initial_state c": c, "initial_state n": n, "initial_state m": m},
    )  # fmt: skip
    batch, seq, heads = (_common.size(q, d) for d in range(3))
    dv = _common.size(v, 3)
    kept = q.new_empty(kept_shape(q, dv, cu_seqlens, keep_states), dtype=torch.float32)
    return q.new_empty((batch, seq, heads, dv)), kept


@_common.register_fake("mlstm_h")
def _(*args):
    return _fake(*args)[0]


@_common.register_fake("mlstm")
def _(
    q, k, v, i, f, c, n, m, cu_seqlens, scale, eps, gate_soft_cap, chunk_size, return_final_state=False,
    keep_states=False,
):  # fmt: skip
    heads, dqk, dv = _common.size(q, 2), _common.size(q, 3), _common.size(v, 3)
    states = _common.num_seqs(q, cu_seqlens) if return_final_state else 0
    shapes = (states, heads, dqk, dv), (states, heads, dqk), (states, heads)
    last = (q.new_empty(shape, dtype=torch.float32) for shape in shapes)
    made = _fake(q, k, v, i, f, c, n, m, cu_seqlens, scale, eps, gate_soft_cap, chunk_size, keep_states)
    return *made, *last


@_common.register_fake("mlstm_backward")
def _(
    dh, dc_last, dn_last, dm_last, q, k, v, i, f, c, n, m, cu_seqlens, h, kept, scale, eps, gate_soft_cap, chunk_size
):  # fmt: skip
    return _common.fake_gradients(q, k, v, i, f, c, n, m)


@_common.register_fake("mlstm_initial_backward")
def _(dh, dc_last, dn_last, q, k, v, i, f, c, n, m, cu_seqlens, h, kept, scale, eps, gate_soft_cap, chunk_size):
    heads, dqk, dv = _common.size(q, 2), _common.size(q, 3), _common.size(v, 3)
    empty = (0, heads, dqk, dv), (0, heads, dqk), (0, heads), (0, heads)
    shapes = (none if t is None else t.shape for t, none in zip((c, n, m, m), empty, strict=True))
    made = (q.new_empty(shape, dtype=torch.float32) for shape in shapes)
    begun = torch.library.get_ctx().new_dynamic_size()
    return *made, q.new_empty(q.shape), q.new_empty((begun,), dtype=torch.uint8)


@_common.register_fake("mlstm_remaining_backward")
def _(
    dh, dc_last, dn_last, dm_last, q, k, v, i, f, c, n, m, cu_seqlens, h, kept, scale, eps, gate_soft_cap, chunk_size,
    begun,
):  # fmt: skip
    dq, *others = _common.fake_gradients(q, k, v, i, f, c, n, m)
    return dq if begun.numel() == 0 else q.new_empty((0,)), *others


@_common.register_fake("mlstm_step")
def _(q, k, v, i, f, c, n, m, state_indices, scale, eps, gate_soft_cap, settled_state=False):
    _common.no_mixed_meta(
        q, k=k, v=v, i=i, f=f, state_indices=state_indices, **{"state c": c, "state n": n, "state m": m}
    )  # fmt: skip
    return q.new_empty(v.shape)


@_common.register_fake("mlstm_prefill")
def _(q, k, v, i, f, c, n, m, state_indices, cu_seqlens, fresh, scale, eps, gate_soft_cap):
    _common.no_mixed_meta(
        q, k=k, v=v, i=i, f=f, state_indices=state_indices, cu_seqlens=cu_seqlens, fresh=fresh,
        **{"state c": c, "state n": n, "state m": m},
    )  # fmt: skip
    return q.new_empty((*(_common.size(q, d) for d in range(3)), _common.size(v, 3)))


def _setup_context(ctx, inputs, output) -> None:
    q, k, v, i, f, c, n, m, cu_seqlens, *ctx.options, ctx.return_final_state = inputs[:14]
    h, kept, *_ = output
    ctx.mark_non_differentiable(kept)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(q, k, v, i, f, c, n, m, cu_seqlens, _common.kept_h(q, h), kept)


def _backward(ctx, dh, _dkept, dc_last, dn_last, dm_last):
    if not ctx.return_final_state:
        dc_last = dn_last = dm_last = None
    return *_gradients(ctx, dh, dc_last, dn_last, dm_last), *[None] * 7


def _gradients(ctx, dh, dc_last=None, dn_last=None, dm_last=None):
    q, k, v, i, f, c, n, m, cu_seqlens, h, kept = ctx.saved_tensors
    dq, dk, dv, di, df, dc, dn, dm = _mlstm_backward(
        dh, dc_last, dn_last, dm_last, q, k, v, i, f, c, n, m, cu_seqlens, h, kept, *ctx.options
    )  # fmt: skip
    dc, dn, dm = (g if t is not None else None for g, t in ((dc, c), (dn, n), (dm, m)))
    return dq, dk, dv, di, df, dc, dn, dm


class _Mlstm(torch.autograd.Function):
    """h alone, for eager calls. Every argument and every output of a Function costs the host a good part of a
    microsecond. The options are therefore one argument, and `kept` is not an output."""

    @staticmethod
    def forward(ctx, *args):
        *inputs, ctx.options, keep_states = args
        h, kept = _mlstm_forward(*inputs, *ctx.options, keep_states)
        ctx.save_for_backward(*inputs, _common.kept_h(inputs[0], h), kept)
        return h

    @staticmethod
    def backward(ctx, dh):
        return *_gradients(ctx, dh), None, None, None


_mlstm = _common.differentiable("mlstm", _setup_context, _backward)
_mlstm_forward = _common.without_gradients("mlstm_forward")
_mlstm_h = _common.without_gradients("mlstm_h")
_mlstm_step = _common.writing("mlstm_step", 5, 6, 7)
_mlstm_prefill = _common.writing("mlstm_prefill", 5, 6, 7)
_mlstm_backward = _common.no_double_backward("mlstm_backward")
mlstm_initial_backward = _common.no_double_backward("mlstm_initial_backward")
mlstm_remaining_backward = _common.no_double_backward("mlstm_remaining_backward")
