"""Exported programs in torch's own operators, for runtimes without this package's, ONNX's among them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from flash_xlstm.reference import conv, pointwise
from flash_xlstm.reference.mlstm import mlstm_parallel
from flash_xlstm.reference.mlstm_sig import mlstm_sig_parallel
from flash_xlstm.reference.slstm import slstm, slstm_step

_Result = Any


def decompose(program: torch.export.ExportedProgram) -> torch.export.ExportedProgram:
    """The program with every operator of this package replaced by its plain form.

    Its inputs are the tensors of the program's inputs, one after the other. Dimensions that were dynamic are. The mLSTM
    takes its parallel form, whose memory is quadratic in the length. The sLSTM is unrolled over its tokens, whose
    number must be static. The result has no gradient.

    Args:
        program: of ``torch.export.export``.

    Raises:
        TypeError: `program` is something else.
        ValueError: the program calls an operator that has no plain form here, or packs sequences.
    """
    if not isinstance(program, torch.export.ExportedProgram):
        raise TypeError(
            f"program is of type {type(program).__name__}; it must be an ExportedProgram, of torch.export.export"
        )
    flat, _ = torch.utils._pytree.tree_flatten(program.example_inputs)
    inputs = {node.name: node.meta.get("val") for node in program.graph.nodes if node.op == "placeholder"}
    shapes = tuple(_dynamic(inputs[name]) for name in program.graph_signature.user_inputs)
    module = program.module()
    assert isinstance(module, fx.GraphModule)
    with torch.no_grad():
        return torch.export.export(_Plain(module), tuple(flat), dynamic_shapes={"args": shapes})


def _dynamic(value: Any) -> dict[int, Any] | None:
    if not isinstance(value, Tensor):
        return None
    dynamic = torch.export.Dim.DYNAMIC
    return {dim: dynamic for dim, size in enumerate(value.shape) if isinstance(size, torch.SymInt)} or None


class _Plain(torch.nn.Module):
    """A program's graph, run node by node."""

    def __init__(self, module: fx.GraphModule) -> None:
        super().__init__()
        self.module = module

    def forward(self, *args: Any) -> Any:
        out = _Interpreter(self.module).run(*args, enable_io_processing=False)
        return torch.utils._pytree.tree_unflatten(out, self.module._out_spec)


class _Interpreter(fx.Interpreter):
    def call_function(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        namespace, _, name = str(target).partition(".")
        if namespace != "flash_xlstm":
            return super().call_function(target, args, kwargs)
        name = name.partition(".")[0]
        if name not in _FORMS:
            raise ValueError(f"the program calls flash_xlstm.{name}, which has no plain form for export")
        return _FORMS[name](*args, **kwargs)


def _whole(cu_seqlens: Tensor | None) -> None:
    if cu_seqlens is not None:
        raise ValueError("the program packs sequences (cu_seqlens), which has no plain form for export")


def _state(*parts: Tensor | None) -> Any:
    return None if parts[0] is None else parts


# The arguments are those of the operators' schemas. Results that only gradients need are None.


def _mlstm(
    q, k, v, i, f, c, n, m, cu_seqlens, scale, eps, gate_soft_cap, chunk_size, return_final_state=False
) -> _Result:  # fmt: skip
    _whole(cu_seqlens)
    h, last = mlstm_parallel(
        q, k, v, i, f, initial_state=_state(c, n, m), scale=scale, eps=eps, gate_soft_cap=gate_soft_cap,
        return_final_state=True,
    )  # fmt: skip
    return h, None, *last


def _mlstm_h(*args: Any) -> Tensor:
    return _mlstm(*args)[0]


def _mlstm_step(
    q, k, v, i, f, c, n, m, state_indices, scale, eps, gate_soft_cap, settled_state=False
) -> Tensor:  # fmt: skip
    if state_indices is not None:
        raise ValueError("the program reads slots of a pool (state_indices), which has no plain form for export")
    q, k, v, i, f = (t[:, None] for t in (q, k, v, i, f))
    h, _, *last = _mlstm(q, k, v, i, f, c, n, m, None, scale, eps, gate_soft_cap, 0)
    for old, new in zip((c, n, m), last, strict=True):
        old.copy_(new)
    return h[:, 0]


def _mlstm_sig(
    q, k, v, i, f, c, n, cu_seqlens, scale, eps, gate_soft_cap, chunk_size, return_final_state, normalize
) -> _Result:  # fmt: skip
    _whole(cu_seqlens)
    h, last = mlstm_sig_parallel(
        q, k, v, i, f, initial_state=_state(c, n), scale=scale, eps=eps, gate_soft_cap=gate_soft_cap,
        normalize=normalize, return_final_state=True,
    )  # fmt: skip
    return h, None, *last


def _slstm(x, R, b, h0, c0, n0, m0, cu_seqlens, recurrent_grad_clip, keep, return_final_state) -> _Result:
    _whole(cu_seqlens)
    h, last = slstm(x, R, b, initial_state=_state(h0, c0, n0, m0), return_final_state=True)
    return h, None, *last


def _slstm_forward(x, R, b, h0, c0, n0, m0, cu_seqlens, recurrent_grad_clip, keep) -> _Result:
    return _slstm(x, R, b, h0, c0, n0, m0, cu_seqlens, recurrent_grad_clip, keep, False)[:2]


def _slstm_step(x, R, b, h, c, n, m) -> Tensor:
    return slstm_step(x, R, b, (h, c, n, m))


def _conv(x, weight, bias, state, cu_seqlens, silu, return_final_state) -> _Result:
    _whole(cu_seqlens)
    options = {"activation": "silu" if silu else None, "initial_state": state, "return_final_state": True}
    return conv.causal_conv1d(x, weight, bias, **options)


def _conv_step(x, weight, bias, state, silu) -> Tensor:
    return conv.causal_conv1d_step(x, weight, bias, state, activation="silu" if silu else None)


def _swiglu_joined(z: Tensor) -> Tensor:
    return pointwise.swiglu(*z.chunk(2, -1))


_FORMS: dict[str, Callable[..., Any]] = {
    "mlstm": _mlstm,
    "mlstm_h": _mlstm_h,
    "mlstm_step": _mlstm_step,
    "mlstm_sig": _mlstm_sig,
    "slstm": _slstm,
    "slstm_forward": _slstm_forward,
    "slstm_step": _slstm_step,
    "causal_conv1d": _conv,
    "causal_conv1d_step": _conv_step,
    "rms_norm": pointwise.rms_norm,
    "add_rms_norm": lambda x, residual, weight, eps: pointwise.rms_norm(x, weight, eps, residual),
    "gated_head_norm": pointwise.gated_head_norm,
    "swiglu": pointwise.swiglu,
    "swiglu_joined": _swiglu_joined,
    "soft_cap": pointwise.soft_cap,
    "linear_rows": lambda x, weight, bias, constant_weights=False: F.linear(x, weight, bias),
}
