"""Names and signatures of NX-AI's ``mlstm_kernels.torch`` and ``mlstm_kernels.torch.backend_module``.

Code written for that package changes one import::

    from flash_xlstm.integrations.mlstm_kernels import get_mlstm_kernel, mLSTMBackend, mLSTMBackendConfig

Every name of a kernel gives this package's op, on CPU and CUDA. The names differ in the input gate only: those with
``siging`` have a sigmoid, the others an exponential. Differences:

- Sequences of any length, initial and final states, with every kernel.
- Gradients are exact. The other package's kernels, those with ``autograd`` in their name excepted, leave out the
  gradient through the normalizer, which is right only in front of a head-wise norm.
- ``chunk_size``, block sizes, numbers of warps and stages, and ``stable_fgate`` are accepted. They change no result,
  and the kernels have their own.
- ``recompute_states_in_bw``, where it is given, is ``keep_states=not recompute_states_in_bw`` of the op. Left out,
  states are kept, which is faster; the other package's kernels then make them again.
- Returned states are float32, or of the dtype that the caller asks for.
- h may be a strided view: (batch, heads, seq, dim) over memory of (batch, seq, heads, dim).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from flash_xlstm.integrations import _cells
from flash_xlstm.ops import _errors
from flash_xlstm.ops._common import check_flag

__all__ = [
    "BackendModeType",
    "ChunkwiseKernelType",
    "DtypeType",
    "SequenceKernelType",
    "StepKernelType",
    "get_available_mlstm_kernels",
    "get_available_mlstm_sequence_kernels",
    "get_available_mlstm_step_kernels",
    "get_mlstm_kernel",
    "get_mlstm_sequence_kernel",
    "get_mlstm_step_kernel",
    "mLSTMBackend",
    "mLSTMBackendConfig",
]

ChunkwiseKernelType = Literal[
    "chunkwise--native_autograd",
    "chunkwise--native_custbw",
    "chunkwise--triton_limit_chunk",
    "chunkwise--triton_xl_chunk",
    "chunkwise--triton_xl_chunk_siging",
    "parallel--native_autograd",
    "parallel--native_custbw",
    "parallel--native_stablef_autograd",
    "parallel--native_stablef_custbw",
    "parallel--triton_limit_headdim",
    "parallel--native_siging_autograd",
    "parallel--native_siging_custbw",
]
SequenceKernelType = Literal["native_sequence__native", "native_sequence__triton"]
StepKernelType = Literal["native", "triton"]
DtypeType = Literal["float32", "bfloat16", "float16"]
BackendModeType = Literal["train", "train_with_padding", "inference"]

LastStates = tuple["Tensor | None", ...]

_KERNELS: list[str] = list(ChunkwiseKernelType.__args__)  # type: ignore[attr-defined]
_SEQUENCE_KERNELS: list[str] = list(SequenceKernelType.__args__)  # type: ignore[attr-defined]
_STEP_KERNELS: list[str] = list(StepKernelType.__args__)  # type: ignore[attr-defined]
_DTYPES: list[str] = list(DtypeType.__args__)  # type: ignore[attr-defined]
_MODES: list[str] = list(BackendModeType.__args__)  # type: ignore[attr-defined]

# Arguments of launches and memory. None of them changes a result.
_LAUNCH = frozenset(
    "chunk_size_inter chunk_size_intra siz_b_L_parallel siz_b_L_loop siz_b_DH_parallel siz_b_DH_loop siz_b_DHQK "
    "siz_b_DHHV num_warps num_warps_intra num_warps_inter num_stages num_stages_intra num_stages_inter "
    "recompute_states_in_bw stable_fgate".split()
)


def mlstm_exponential(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    i: Tensor,
    f: Tensor,
    c_initial: Tensor | None = None,
    n_initial: Tensor | None = None,
    m_initial: Tensor | None = None,
    return_last_states: bool = False,
    eps: float = 1e-6,
    chunk_size: int = 64,
    autocast_kernel_dtype: torch.dtype = torch.float32,
    **launch: Any,
) -> Tensor | tuple[Tensor, LastStates]:
    """The mLSTM with an exponential input gate, :func:`flash_xlstm.ops.mlstm`.

    Args:
        q, k: (batch, heads, seq, dqk); v: (batch, heads, seq, dv); i, f: (batch, heads, seq).
        c_initial, n_initial, m_initial: (batch, heads, dqk, dv), (batch, heads, dqk), (batch, heads, 1); together, or
            none.
        return_last_states: also return the states.
        eps: added to the normalizer after the maximum.
        chunk_size: changes nothing.
        autocast_kernel_dtype: the dtype of q, k, v in the kernel, where autocast is on.
        launch: the other package's further arguments. Of these `recompute_states_in_bw`, a bool, is the opposite of
            the op's `keep_states`. Left out, states are kept, whereas True is that package's default. The others change
            nothing.

    Returns:
        h (batch, heads, seq, dv), and ``(c, n, m)`` in float32 with `return_last_states`.

    Raises:
        TypeError: an argument that no kernel has, or a `recompute_states_in_bw` that is no bool.
    """
    try:
        return _cells.mlstm(
            q, k, v, i, f, (c_initial, n_initial, m_initial), eps=eps, return_last_states=return_last_states,
            kernel_dtype=autocast_kernel_dtype, keep_states=_keep_states(launch),
        )  # fmt: skip
    except Exception as error:
        if torch.compiler.is_compiling():
            raise
        raise _errors.explain(error, mlstm_exponential, locals()) from None


def mlstm_sigmoid(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    i: Tensor,
    f: Tensor,
    c_initial: Tensor | None = None,
    n_initial: Tensor | None = None,
    m_initial: Tensor | None = None,
    return_last_states: bool = False,
    eps: float = 1e-6,
    normalize: bool = True,
    chunk_size: int = 128,
    autocast_kernel_dtype: torch.dtype = torch.float32,
    **launch: Any,
) -> Tensor | tuple[Tensor, LastStates]:
    """The mLSTM with a sigmoid input gate, :func:`flash_xlstm.ops.mlstm_sig`. There is no m: the states are ``(c, n)``,
    and `m_initial` is for calls that pass one. Everything else is as in :func:`mlstm_exponential`."""
    try:
        return _cells.mlstm(
            q, k, v, i, f, (c_initial, n_initial, None), eps=eps, return_last_states=return_last_states,
            kernel_dtype=autocast_kernel_dtype, sigmoid=True, normalize=normalize, keep_states=_keep_states(launch),
        )  # fmt: skip
    except Exception as error:
        if torch.compiler.is_compiling():
            raise
        raise _errors.explain(error, mlstm_sigmoid, locals()) from None


def mlstm_sequence(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    i: Tensor,
    f: Tensor,
    c_initial: Tensor | None = None,
    n_initial: Tensor | None = None,
    m_initial: Tensor | None = None,
    return_last_states: bool = False,
    eps: float = 1e-6,
    dtype_state: torch.dtype = torch.float32,
    **launch: Any,
) -> Tensor | tuple[Tensor, LastStates]:
    """As :func:`mlstm_exponential`, with states of `dtype_state`."""
    try:
        return _cells.mlstm(
            q, k, v, i, f, (c_initial, n_initial, m_initial), eps=eps, return_last_states=return_last_states,
            kernel_dtype=None, state_dtype=dtype_state, keep_states=_keep_states(launch),
        )  # fmt: skip
    except Exception as error:
        if torch.compiler.is_compiling():
            raise
        raise _errors.explain(error, mlstm_sequence, locals()) from None


def mlstm_step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    i: Tensor,
    f: Tensor,
    c: Tensor,
    n: Tensor,
    m: Tensor,
    eps: float = 1e-6,
    dtype_state: torch.dtype = torch.float32,
    **launch: Any,
) -> tuple[Tensor, _cells.States]:
    """One token: q, k (batch, heads, dqk), v (batch, heads, dv), i, f (batch, heads, 1); c, n, m as in
    :func:`mlstm_exponential`. They are not changed. Returns h (batch, heads, dv) and the new states, in `dtype_state`.
    """
    try:
        return _cells.mlstm_step(
            q, k, v, i, f, (c, n, m), eps=eps, state_dtype=dtype_state, keep_states=_keep_states(launch)
        )
    except Exception as error:
        if torch.compiler.is_compiling():
            raise
        raise _errors.explain(error, mlstm_step, locals()) from None


def get_available_mlstm_kernels() -> list[str]:
    """Names for :func:`get_mlstm_kernel`."""
    return list(_KERNELS)


def get_mlstm_kernel(name: str) -> Callable[..., Any]:
    """:func:`mlstm_sigmoid` for a name with ``siging``, otherwise :func:`mlstm_exponential`.

    Raises:
        ValueError: an unknown name.
    """
    _check_one_of("name", name, _KERNELS)
    return mlstm_sigmoid if "siging" in name else mlstm_exponential


def get_available_mlstm_sequence_kernels() -> list[str]:
    """Names for :func:`get_mlstm_sequence_kernel`."""
    return list(_SEQUENCE_KERNELS)


def get_mlstm_sequence_kernel(name: str) -> Callable[..., Any]:
    """:func:`mlstm_sequence`.

    Raises:
        ValueError: an unknown name.
    """
    _check_one_of("name", name, _SEQUENCE_KERNELS)
    return mlstm_sequence


def get_available_mlstm_step_kernels() -> list[str]:
    """Names for :func:`get_mlstm_step_kernel`."""
    return list(_STEP_KERNELS)


def get_mlstm_step_kernel(name: str) -> Callable[..., Any]:
    """:func:`mlstm_step`.

    Raises:
        ValueError: an unknown name.
    """
    _check_one_of("name", name, _STEP_KERNELS)
    return mlstm_step


@dataclass
class mLSTMBackendConfig:
    """Settings of :class:`mLSTMBackend`.

    Attributes:
        chunkwise_kernel, sequence_kernel, step_kernel: names of the kernels. ``siging`` in the first chooses the
            sigmoid input gate, which has no inference mode.
        mode: ``train`` and ``train_with_padding`` return states if `return_last_states`; ``inference`` always does.
        chunk_size: at least 1; changes nothing.
        return_last_states: whether training also returns the states.
        autocast_kernel_dtype: the dtype of q, k, v in the kernel, where autocast is on.
        eps: at least 0; added to the normalizer after the maximum.
        inference_state_dtype: the dtype of the states that inference mode returns.
        normalize_siging: whether the sigmoid variant divides by the normalizer.

    Raises:
        ValueError, TypeError: an unknown value, or one that is not as above.
    """

    chunkwise_kernel: ChunkwiseKernelType = "chunkwise--native_autograd"
    sequence_kernel: SequenceKernelType = "native_sequence__native"
    step_kernel: StepKernelType = "native"
    mode: BackendModeType = "train"
    chunk_size: int = 64
    return_last_states: bool = True
    autocast_kernel_dtype: DtypeType = "bfloat16"
    eps: float = 1e-6
    inference_state_dtype: DtypeType = "float32"
    normalize_siging: bool = True

    def __post_init__(self) -> None:
        check_config(self)
        _check_number("chunk_size", self.chunk_size, int, 1)
        _check_number("eps", self.eps, float, 0)
        check_flag("return_last_states", self.return_last_states)
        check_flag("normalize_siging", self.normalize_siging)


def check_config(config: Any) -> None:
    """Checks the settings of a backend, of this module's class or of another library's with these fields.

    Raises:
        ValueError: an unknown value, or the sigmoid input gate in inference mode.
    """
    _check_one_of("chunkwise_kernel", config.chunkwise_kernel, _KERNELS)
    _check_one_of("sequence_kernel", config.sequence_kernel, _SEQUENCE_KERNELS)
    _check_one_of("step_kernel", config.step_kernel, _STEP_KERNELS)
    check_common(config)
    if config.mode == "inference":
        _refuse_sigmoid(config)


def check_common(config: Any) -> None:
    """The part of :func:`check_config` that is not about names of kernels."""
    _check_one_of("mode", config.mode, _MODES)
    _check_one_of("autocast_kernel_dtype", config.autocast_kernel_dtype, _DTYPES)
    _check_one_of("inference_state_dtype", config.inference_state_dtype, _DTYPES)


class mLSTMBackend(nn.Module):
    """The mLSTM by a configuration: sequences in training, sequences and single tokens in inference."""

    config_class = mLSTMBackendConfig

    def __init__(self, config: mLSTMBackendConfig) -> None:
        super().__init__()
        self.config = config
        self.chunkwise_kernel_fn = get_mlstm_kernel(config.chunkwise_kernel)
        self.sequence_kernel_fn = get_mlstm_sequence_kernel(config.sequence_kernel)
        self.step_kernel_fn = get_mlstm_step_kernel(config.step_kernel)

    # flash_xlstm.integrations.accelerate calls it with another library's backend as self: it may use self.config only.
    def forward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        i: Tensor,
        f: Tensor,
        c_initial: Tensor | None = None,
        n_initial: Tensor | None = None,
        m_initial: Tensor | None = None,
        return_last_states: bool | None = None,
        mode: Literal["train", "inference"] | None = None,
    ) -> Tensor | tuple[Tensor, LastStates]:
        """Shapes are those of :func:`mlstm_exponential`.

        Args:
            return_last_states: None takes the configuration's. Inference mode always returns them.
            mode: None takes the configuration's.

        Raises:
            ValueError, TypeError: an argument is not as above, or `mode` is unknown.
        """
        states = c_initial, n_initial, m_initial
        sigmoid = "siging" in self.config.chunkwise_kernel
        try:
            return run_backend(self.config, q, k, v, i, f, states, return_last_states, mode, sigmoid)
        except Exception as error:
            if torch.compiler.is_compiling():
                raise
            raise _errors.explain(error, mLSTMBackend.forward, locals()) from None

    def extra_repr(self) -> str:
        return f"{self.config}"


def run_backend(
    config: Any,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    i: Tensor,
    f: Tensor,
    states: tuple[Tensor | None, ...],
    return_last_states: bool | None,
    mode: str | None,
    sigmoid: bool,
) -> Tensor | tuple[Tensor, LastStates]:
    """:meth:`mLSTMBackend.forward` of a configuration."""
    if mode is None:
        mode = config.mode
    _check_one_of("mode", mode, _MODES)
    if mode != "inference":
        state_dtype = torch.float32
        if return_last_states is None:
            return_last_states = config.return_last_states
    else:
        if sigmoid:
            _refuse_sigmoid(config)
        state_dtype = getattr(torch, config.inference_state_dtype)
        return_last_states = True
        c, n, m = states
        if q.shape[2] == 1 and c is not None and n is not None and m is not None:
            h, last = _cells.mlstm_step(
                q.squeeze(2), k.squeeze(2), v.squeeze(2), i, f, (c, n, m), eps=config.eps, state_dtype=state_dtype
            )
            return h.unsqueeze(2), last
    return _cells.mlstm(
        q, k, v, i, f, states, eps=config.eps, return_last_states=return_last_states,
        kernel_dtype=getattr(torch, config.autocast_kernel_dtype), state_dtype=state_dtype,
        sigmoid=sigmoid, normalize=not sigmoid or config.normalize_siging,
    )  # fmt: skip


def _refuse_sigmoid(config: Any) -> None:
    if "siging" in config.chunkwise_kernel:
        raise ValueError(
            f"mode is 'inference' with chunkwise_kernel {config.chunkwise_kernel!r}, but steps have an exponential "
            "input gate; it must be 'train' or 'train_with_padding'"
        )


def _keep_states(launch: dict[str, Any]) -> bool:
    """The op's `keep_states`. Refuses unknown arguments."""
    for name in launch:
        if name not in _LAUNCH:
            raise TypeError(f"{name} is no argument of this kernel")
    recompute = launch.get("recompute_states_in_bw", False)
    check_flag("recompute_states_in_bw", recompute)
    return not recompute


def _check_number(name: str, value: Any, kind: type, least: int) -> None:
    for wrong in _errors._wrong(name, value, kind):
        raise wrong
    if not least <= value < math.inf:
        raise ValueError(f"{name} is {value}; it must be at least {least}, and finite")


def _check_one_of(name: str, value: Any, allowed: list[str]) -> None:
    if value not in allowed:
        raise ValueError(f"{name} is {value!r}; it must be one of {', '.join(allowed)}")
