"""The ops in the layouts that NX-AI's packages have in common: heads before the sequence, m of shape (batch, heads, 1),
an sLSTM's state in one tensor."""

from __future__ import annotations

import torch
from torch import Tensor

from flash_xlstm import ops
from flash_xlstm.ops._common import needs_gradients

States = tuple[Tensor, Tensor, Tensor]


def rows(t: Tensor) -> Tensor:
    """`t` with a contiguous last dimension, which the ops want."""
    return t if t.stride(-1) == 1 else t.contiguous()


def mlstm(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    i: Tensor,
    f: Tensor,
    states: tuple[Tensor | None, ...],
    *,
    eps: float,
    return_last_states: bool,
    kernel_dtype: torch.dtype | None,
    state_dtype: torch.dtype = torch.float32,
    scale: float | None = None,
    sigmoid: bool = False,
    normalize: bool = True,
    keep_states: bool = True,
) -> Tensor | tuple[Tensor, tuple[Tensor | None, ...]]:
    """A sequence.

    Args:
        q, k: (batch, heads, seq, dqk); v: (batch, heads, seq, dv); i, f: (batch, heads, seq).
        states: c (batch, heads, dqk, dv), n (batch, heads, dqk), m (batch, heads, 1), or three None. m is not read with
            `sigmoid`.
        kernel_dtype: the dtype of q, k, v in the kernel under autocast; None for autocast's.
        state_dtype: the dtype of the returned states.
        sigmoid, normalize: the mLSTM with a sigmoid input gate, :func:`flash_xlstm.ops.mlstm_sig`. Its states are c, n.
        keep_states: the op's.

    Returns:
        h (batch, heads, seq, dv), and the states with `return_last_states`.
    """
    device = q.device.type
    if kernel_dtype is not None and device != "meta" and torch.is_autocast_enabled(device):
        q, k, v = (t.to(kernel_dtype) for t in (q, k, v))
        with torch.autocast(device, enabled=False):
            return mlstm(
                q, k, v, i, f, states, eps=eps, return_last_states=return_last_states, kernel_dtype=None,
                state_dtype=state_dtype, scale=scale, sigmoid=sigmoid, normalize=normalize, keep_states=keep_states,
            )  # fmt: skip
    for name, gate in (("i", i), ("f", f)):  # in the caller's layout; the op's errors tell its own
        if gate.shape != q.shape[:3]:
            raise ValueError(
                f"{name} has shape {tuple(gate.shape)}; it must be (batch, heads, seq), as q has {tuple(q.shape[:3])}"
            )
    q, k, v, i, f = (t.transpose(1, 2) for t in (q, k, v, i, f))
    i, f = _gates(i, f, q)
    initial = _initial(states, sigmoid, normalize)
    options = {
        "initial_state": initial, "scale": scale, "eps": eps, "return_final_state": return_last_states,
        "keep_states": keep_states,
    }  # fmt: skip
    if sigmoid:
        result = ops.mlstm_sig(rows(q), rows(k), rows(v), i, f, normalize=normalize, **options)  # type: ignore[arg-type]
    else:
        result = ops.mlstm(rows(q), rows(k), rows(v), i, f, **options)  # type: ignore[arg-type]
    if not return_last_states:
        assert isinstance(result, Tensor)
        return result.transpose(1, 2)
    h, last = result
    if not sigmoid:
        c, n, m = last  # type: ignore[misc]
        last = c, n, m.unsqueeze(-1)
    return h.transpose(1, 2), tuple(t if t is None else t.to(state_dtype) for t in last)


def mlstm_step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    i: Tensor,
    f: Tensor,
    states: States,
    *,
    eps: float,
    state_dtype: torch.dtype = torch.float32,
    scale: float | None = None,
    keep_states: bool = True,
) -> tuple[Tensor, States]:
    """One token. q, k (batch, heads, dqk), v (batch, heads, dv), i, f (batch, heads, 1); `states` as in :func:`mlstm`.
    They are not changed. Returns h (batch, heads, dv) and the new states."""
    if needs_gradients((q, k, v, i, f, *states)):
        h, last = mlstm(
            q.unsqueeze(2), k.unsqueeze(2), v.unsqueeze(2), i, f, states, eps=eps, return_last_states=True,
            kernel_dtype=None, state_dtype=state_dtype, scale=scale, keep_states=keep_states,
        )  # fmt: skip
        return h.squeeze(2), last  # type: ignore[return-value]
    i, f = _gates(i.squeeze(-1), f.squeeze(-1), q)
    c_dtype = torch.bfloat16 if state_dtype == torch.bfloat16 else torch.float32
    c, n, m = _copy(states[0], c_dtype), _copy(states[1], torch.float32), _copy(states[2], torch.float32)
    h = ops.mlstm_step(rows(q), rows(k), rows(v), i, f, (c, n, m.squeeze(-1)), scale=scale, eps=eps)
    if state_dtype != torch.float32:
        c, n, m = c.to(state_dtype), n.to(state_dtype), m.to(state_dtype)
    return h, (c, n, m)


def slstm(x: Tensor, R: Tensor, b: Tensor, state: Tensor | None, *, clip: float | None = None) -> tuple[Tensor, Tensor]:
    """A sequence of the sLSTM.

    Args:
        x: (batch, seq, 4, heads, dim); R: (4, heads, out, in); b: (4, heads, dim). Gates in the order i, f, z, o.
        state: (4, batch, heads, dim), the parts h, c, n, m, in any float dtype; None for a fresh one. It is not
            changed.
        clip: bound of the gradient that reaches h_{t-1} through R, as in :func:`flash_xlstm.ops.slstm`.

    Returns:
        h (batch, seq, heads, dim), and the state after it in float32.
    """
    x = rows(x)
    R, b = (t if t.dtype in (x.dtype, torch.float32) else t.float() for t in (R, b))
    if x.shape[1] == 1 and not needs_gradients((x, R, b, state)):
        if state is None:
            state = x.new_zeros((4, x.shape[0], *x.shape[3:]), dtype=torch.float32)
        else:
            state = _copy(state, torch.float32)
        h = ops.slstm_step(x[:, 0], R, b, state.unbind())  # type: ignore[arg-type]
        return h.unsqueeze(1), state
    initial = None if state is None else state.float().contiguous().unbind()
    h, last = ops.slstm(
        x, R, b, initial_state=initial, return_final_state=True, recurrent_grad_clip=clip  # type: ignore[arg-type]
    )  # fmt: skip
    return h, torch.stack(last)


def _copy(t: Tensor, dtype: torch.dtype) -> Tensor:
    """A contiguous copy, which a step may write."""
    if t.dtype == dtype and t.is_contiguous():
        return t.clone()  # half the time of the other
    return t.to(dtype, copy=True, memory_format=torch.contiguous_format)


def _gates(i: Tensor, f: Tensor, q: Tensor) -> tuple[Tensor, Tensor]:
    """Gates of one dtype that the ops take: float32, or the dtype of q."""
    if i.dtype == f.dtype and i.dtype in (torch.float32, q.dtype):
        return i, f
    return i.float(), f.float()


def _initial(states: tuple[Tensor | None, ...], sigmoid: bool, normalize: bool) -> tuple[Tensor | None, ...] | None:
    """The initial state of the op, in float32."""
    c, n, m = states
    if sigmoid:
        m = None
        if c is None and n is None:
            return None
        if c is None or (n is None and normalize):
            raise ValueError(f"{'c' if c is None else 'n'}_initial is None; the states must be given together")
        return c.float(), n.float() if n is not None and normalize else None
    if c is None and n is None and m is None:
        return None
    if c is None or n is None or m is None:
        missing = "c" if c is None else "n" if n is None else "m"
        raise ValueError(f"{missing}_initial is None; the states must be given together")
    return c.float(), n.float(), m.float().squeeze(-1)
