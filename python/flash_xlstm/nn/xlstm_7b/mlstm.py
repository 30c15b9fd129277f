"""The mLSTM layer: projections, mLSTM, head-wise norm with output gate, output projection."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from flash_xlstm import ops, reference
from flash_xlstm.nn.linear import gradients_are_looked_at, linear, nothing_looks_on, unchanged
from flash_xlstm.nn.packing import closed, refuse_step
from flash_xlstm.nn.state import State, fitting_state, has_slots
from flash_xlstm.nn.xlstm_7b.norm import MultiHeadLayerNorm, op_weight
from flash_xlstm.nn.xlstm_7b.projections import FusableProjections
from flash_xlstm.ops import _common
from flash_xlstm.ops.mlstm import keeps_for
from flash_xlstm.ops.mlstm_gated import mlstm_gated

KERNELS = ("flash", "chunkwise", "parallel", "recurrent")
STEP_KERNELS = ("flash", "reference")


def _sequence_kernel(kernel: str, chunk_size: int | None) -> Callable[..., Any]:
    if kernel == "flash":
        return functools.partial(ops.mlstm, chunk_size=chunk_size)
    if kernel == "chunkwise":
        return functools.partial(reference.mlstm_chunkwise, chunk_size=chunk_size or 64)
    if kernel == "parallel":
        return reference.mlstm_parallel
    if kernel == "recurrent":
        return reference.mlstm_recurrent
    raise ValueError(f"kernel is {kernel!r}; it must be one of {', '.join(KERNELS)}")


class mLSTMLayer(FusableProjections):
    """The multi-head mLSTM layer of the xLSTM 7B (arXiv 2503.13427).

    Args:
        hidden_size: size of input and output.
        num_heads: heads; `qk_dim` and `v_dim` must be multiples of it.
        qk_dim: size of queries and of keys, all heads together; default ``hidden_size // 2``.
        v_dim: size of values, all heads together; default `hidden_size`.
        use_bias: biases in the linear layers and the norm. The input and forget gates always have one.
        gate_soft_cap: soft cap of the input and forget gates' pre-activations, or None.
        eps: added to the mLSTM's normalizer.
        norm_eps: added to the variance in the head-wise norm.
        weight_mode: "single" or "fused". Fused, ``qkv_opreact`` stacks q, k, v and ogate_preact, and
            ``ifgate_preact`` stacks igate_preact and fgate_preact.
        kernel: "flash" for the compiled op, or a plain PyTorch form: "chunkwise", "parallel" (quadratic) or
            "recurrent". The op does not take float64; there "flash" means "chunkwise".
        step_kernel: the kernel of one token in place: "flash" or "reference". float64 always takes "reference".
        chunk_size: tokens processed together; with None the kernel chooses.
        autocast_kernel_dtype: dtype of q, k and v in the kernel under autocast; None means autocast's own.

    Raises:
        ValueError: a size is not a multiple of `num_heads`, or a name is unknown.
    """

    #: The ranks that share each sequence (:func:`flash_xlstm.distributed.context.set_group`), or None.
    context_group: Any = None
    #: Whether training keeps the kernel's states for the backward where :func:`flash_xlstm.ops.mlstm` can: faster, for
    #: more memory. Gradient checkpointing keeps none.
    keep_states: bool = True

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        *,
        qk_dim: int | None = None,
        v_dim: int | None = None,
        use_bias: bool = False,
        gate_soft_cap: float | None = 15.0,
        eps: float = 1e-6,
        norm_eps: float = 1e-6,
        weight_mode: str = "single",
        kernel: str = "flash",
        step_kernel: str = "flash",
        chunk_size: int | None = None,
        autocast_kernel_dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(weight_mode)
        qk_dim = hidden_size // 2 if qk_dim is None else qk_dim
        v_dim = hidden_size if v_dim is None else v_dim
        for name, size in (("qk_dim", qk_dim), ("v_dim", v_dim)):
            if size < num_heads or size % num_heads:
                raise ValueError(f"{name} is {size}; it must be a positive multiple of num_heads, which is {num_heads}")
        if step_kernel not in STEP_KERNELS:
            raise ValueError(f"step_kernel is {step_kernel!r}; it must be one of {', '.join(STEP_KERNELS)}")
        self.num_heads = num_heads
        self.qk_dim = qk_dim
        self.v_dim = v_dim
        self.gate_soft_cap = gate_soft_cap
        self.eps = eps
        self.kernel = kernel
        self.step_kernel = step_kernel
        self.chunk_size = chunk_size
        self.autocast_kernel_dtype = autocast_kernel_dtype
        self._mlstm = _sequence_kernel(kernel, chunk_size)
        self._build_projections(
            hidden_size,
            {
                "qkv_opreact": {"q": qk_dim, "k": qk_dim, "v": v_dim, "ogate_preact": v_dim},
                "ifgate_preact": {"igate_preact": num_heads, "fgate_preact": num_heads},
            },
            {"qkv_opreact": use_bias, "ifgate_preact": True},
        )
        self.multihead_norm = MultiHeadLayerNorm(num_heads, v_dim // num_heads, norm_eps, use_bias=use_bias)
        self.out_proj = nn.Linear(v_dim, hidden_size, bias=use_bias)

    def forward(
        self,
        x: Tensor,
        state: State | None = None,
        padding: Tensor | None = None,
        *,
        return_state: bool = False,
        inplace: bool = False,
        state_indices: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
    ) -> tuple[Tensor, State | None]:
        """One pass over a sequence.

        Args:
            x: (batch, seq, hidden_size).
            state: ``(c, n, m)`` before the first token, as for :func:`flash_xlstm.ops.mlstm`, in any float dtype;
                None means zeros.
            padding: (batch, seq) bool, True at tokens that must leave the state alone. The output at such a token
                has no meaning.
            return_state: also return the state after the last token.
            inplace: write the new state into `state`'s own tensors, in their dtypes. This applies only to one token
                with a state and gradients off.
            state_indices: for a step in place, the slot of `state` that each row uses, as in
                :func:`flash_xlstm.ops.mlstm_step`. `state` then holds any number of slots.
            cu_seqlens: (num_seqs + 1,) int32 offsets of packed sequences, as in :func:`flash_xlstm.ops.mlstm`. batch
                must then be 1, and states have num_seqs in place of batch.

        Raises:
            TypeError, ValueError: `padding` is not as above.
            ValueError: `state_indices` is given for anything but one token in place, or `cu_seqlens` for one token in
                place.

        Returns:
            ``(y, state)``. y is (batch, seq, hidden_size). The state is None unless `return_state`. It is float32, or
            float64 for float64 layers; c is bfloat16 if that of `state` is. In place it is `state` itself.
        """
        if self.weight_mode == "fused":
            z = linear(self.get_submodule("qkv_opreact"), x)
            plain = state is None and not return_state and state_indices is None and self.context_group is None
            if plain and (weight := self._joined_norm_weight(z)) is not None:
                return linear(self.out_proj, self._joined(x, z, weight, padding, cu_seqlens)), None
            q, k, v, o = z.split(list(self.projection_groups["qkv_opreact"].values()), -1)
        else:
            q, k, v, o = self._project(x, "qkv_opreact")
        step = inplace and state is not None and x.shape[1] == 1 and not torch.is_grad_enabled()
        if step and self.context_group is not None:
            raise ValueError("context_group is set: a sequence is split over ranks; for single tokens it must be None")
        if state_indices is not None and not step:
            raise ValueError("state_indices is for one token with a state, in place and without gradients")
        q, k, v = (t.unflatten(-1, (self.num_heads, t.shape[-1] // self.num_heads)) for t in (q, k, v))
        run: Callable[..., Any] = self._sequence
        if step:
            refuse_step(step, cu_seqlens)
            run = functools.partial(self._step, state_indices=state_indices)
        elif cu_seqlens is not None:
            run = functools.partial(self._sequence, cu_seqlens=cu_seqlens)
        # No autocast on the meta device: asking whether it is enabled there raises.
        if self.autocast_kernel_dtype is None or x.is_meta or not torch.is_autocast_enabled(x.device.type):
            h, state = run(q, k, v, *self._gates(x, padding, q.dtype), state, return_state)
        else:
            q, k, v = (t.to(self.autocast_kernel_dtype) for t in (q, k, v))
            i, f = self._gates(x, padding, q.dtype)
            with torch.autocast(x.device.type, enabled=False):
                h, state = run(q, k, v, i, f, state, return_state)
        y = linear(self.out_proj, self.multihead_norm(h, o))
        return y, state

    def _joined_norm_weight(self, z: Tensor) -> Tensor | None:
        """The head norm's weight if one op may take the joined projection z, else None. The gradient of z is then one
        tensor."""
        norm = self.multihead_norm
        if (
            self.kernel != "flash"
            or not torch.is_grad_enabled()
            or not unchanged(norm, MultiHeadLayerNorm)
            or gradients_are_looked_at(norm)
            or not (torch.compiler.is_compiling() or nothing_looks_on())
            or forward_ad._current_level >= 0
            or (
                self.autocast_kernel_dtype not in (None, z.dtype)
                and not z.is_meta
                and torch.is_autocast_enabled(z.device.type)
            )
        ):
            return None
        return op_weight(z, norm.weight, norm.bias)

    def _joined(
        self, x: Tensor, z: Tensor, weight: Tensor, padding: Tensor | None, cu_seqlens: Tensor | None
    ) -> Tensor:
        """The input of the output projection, from the joined projection z."""
        i, f = self._gates(x, padding, z.dtype)
        return mlstm_gated(
            z, i, f, weight, cu_seqlens, self.num_heads, self.qk_dim, None, self.eps,
            self.gate_soft_cap, _common.chunk_size_or_0(self.chunk_size), self.multihead_norm.eps,
            self.keep_states and keeps_for((z, i, f)),
        )[0]  # fmt: skip

    def _gates(self, x: Tensor, padding: Tensor | None, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Pre-activations of both gates, (batch, seq, heads), in a dtype that the kernels take beside q of `dtype`."""
        i, f = self._project(x, "ifgate_preact")
        if i.dtype not in (dtype, torch.float64):
            i, f = i.float(), f.float()
        return closed(i, f, padding)

    def _sequence(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        i: Tensor,
        f: Tensor,
        state: State | None,
        return_state: bool,
        cu_seqlens: Tensor | None = None,
    ) -> tuple[Tensor, State | None]:
        run = self._mlstm
        if q.dtype == torch.float64 and self.kernel == "flash" and self.context_group is None:
            run = _sequence_kernel("chunkwise", self.chunk_size)
        elif self.kernel == "flash":
            run = functools.partial(run, keep_states=self.keep_states)
        out = run(
            q, k, v, i, f, initial_state=None if state is None else fitting_state(state, q),
            eps=self.eps, gate_soft_cap=self.gate_soft_cap, cu_seqlens=cu_seqlens, return_final_state=return_state,
        )  # fmt: skip
        return out if return_state else (out, None)

    def _step(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        i: Tensor,
        f: Tensor,
        state: State,
        return_state: bool,
        state_indices: Tensor | None,
    ) -> tuple[Tensor, State | None]:
        if i.dtype != q.dtype:
            i, f = i.float(), f.float()
        q, k, v, i, f = (t[:, 0] for t in (q, k, v, i, f))
        options: dict[str, Any] = {"state_indices": state_indices, "eps": self.eps, "gate_soft_cap": self.gate_soft_cap}
        if self.step_kernel == "reference" or q.dtype == torch.float64:
            h = reference.mlstm_step(q, k, v, i, f, state, **options)
        else:
            written: Any = tuple(
                t if t is None or t.is_contiguous() or has_slots(t) else t.contiguous() for t in fitting_state(state, q)
            )
            h = ops.mlstm_step(q, k, v, i, f, written, **options)
            for given, new in zip(state, written, strict=True):
                if new is not given:
                    given.copy_(new)
        return h[:, None], state if return_state else None

    def extra_repr(self) -> str:
        return (
            f"heads={self.num_heads}, qk_dim={self.qk_dim}, v_dim={self.v_dim}, kernel={self.kernel}, "
            f"step_kernel={self.step_kernel}, weight_mode={self.weight_mode}"
        )
