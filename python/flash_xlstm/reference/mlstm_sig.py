"""Plain PyTorch forms of the mLSTM with a sigmoid input gate: the mLSTM's forms without the stabilizer.

Arguments and results are as in :func:`flash_xlstm.ops.mlstm_sig`, with any float dtype. Final states are float32
(float64 for float64).
"""

from __future__ import annotations

from torch import Tensor

from flash_xlstm.reference import mlstm as _mlstm

State = tuple[Tensor, Tensor | None]


def _run(form, q, k, v, i, f, cu_seqlens, return_final_state, initial_state, normalize, options, *chunk_size):
    state = None
    if initial_state is not None:
        c, n = initial_state
        state = c, c.new_zeros(c.shape[:-1]) if n is None else n, c.new_zeros(c.shape[:-2])
    h, (c, n, _) = _mlstm.run(form, q, k, v, i, f, cu_seqlens, True, state, options, *chunk_size)
    return (h, (c, n if normalize else None)) if return_final_state else h


def mlstm_sig_recurrent(
    q,
    k,
    v,
    i,
    f,
    *,
    normalize=True,
    initial_state=None,
    scale=None,
    eps=1e-6,
    gate_soft_cap=None,
    cu_seqlens=None,
    return_final_state=False,
):
    """The mLSTM with a sigmoid input gate token by token, its definition."""
    options = _mlstm.Options(scale, eps, gate_soft_cap, sigmoid=True, normalize=normalize)
    form = _mlstm.recurrent
    return _run(form, q, k, v, i, f, cu_seqlens, return_final_state, initial_state, normalize, options)


def mlstm_sig_parallel(q, k, v, i, f, **options):
    """As one chunk, quadratic in seq. Arguments and results as :func:`mlstm_sig_recurrent`."""
    return mlstm_sig_chunkwise(q, k, v, i, f, chunk_size=q.shape[1], **options)


def mlstm_sig_chunkwise(
    q,
    k,
    v,
    i,
    f,
    *,
    normalize=True,
    initial_state=None,
    scale=None,
    eps=1e-6,
    gate_soft_cap=None,
    chunk_size=64,
    cu_seqlens=None,
    return_final_state=False,
):
    """Chunk by chunk, linear in seq. Arguments and results as :func:`mlstm_sig_recurrent`."""
    options = _mlstm.Options(scale, eps, gate_soft_cap, sigmoid=True, normalize=normalize)
    form = _mlstm.chunkwise
    return _run(
        form, q, k, v, i, f, cu_seqlens, return_final_state, initial_state, normalize, options, chunk_size or 64
    )
