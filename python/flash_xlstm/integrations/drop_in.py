"""Live models of other libraries on this package's ops."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from flash_xlstm.integrations import _cells, _tirex
from flash_xlstm.integrations.flashrnn import kernel_dtype_of
from flash_xlstm.integrations.mlstm_kernels import check_common, check_config, mLSTMBackend, run_backend
from flash_xlstm.nn.block_stack.slstm import _NOTHING, _weights_of_op

__all__ = ["Accelerated", "accelerate", "undo"]


def accelerate(model: Any) -> Accelerated:
    """Makes the xLSTM cells of a model run on this package's ops. The model is changed in place, its weights are not.

    Known cells, by the names of their classes, so that nothing is imported that the model does not need:

    - transformers' ``xLSTMForCausalLM``, with and without the package ``xlstm``;
    - NX-AI's ``xlstm_large`` and everything else around ``mlstm_kernels.torch.backend_module.mLSTMBackend``;
    - NX-AI's ``xlstm`` block stack: ``mLSTMCell``, and ``sLSTMCell`` with both backends;
    - TiRex-2 and TiRex: their mLSTM and sLSTM layers, from projections to norm.

    Results are the original's within rounding: outputs, states and gradients, in training and inference, eagerly and
    under :func:`torch.compile` (accelerate first, then compile). CPU and CUDA; float32, bfloat16 and float16. A copy of
    the model (``copy.deepcopy``, pickle) is accelerated too. Weights may be loaded before and after.

        with accelerate(model):
            model.generate(...)

    Args:
        model: a module, or an object that passes ``named_modules`` on, as TiRex-2's ``ForecastModel``.

    Returns:
        What was changed. Its ``undo()``, and leaving a ``with`` block, restores the model. :func:`undo` does so without
        it.

    Raises:
        ValueError: the model has no known cell; or a cell, which is named, does what the ops do not: another function,
            a clipped output, a forward that is not its class's. Nothing is changed.
        TypeError: `model` is no module.
    """
    changes = []
    for name, module in _named_modules(model):
        found = _known(type(module))
        if found is not None:
            original, cell = found
            _check(name, module, original, cell)
            changes += [_Change(name, module, attribute, new) for attribute, new in cell.patches.items()]
        layer = _layer(module)
        if layer is not None:
            changes.append(_Change(name, module, "forward", layer))
    if not changes:
        if any(type(module).__module__.startswith("flash_xlstm.") for _, module in model.named_modules()):
            raise ValueError(f"{type(model).__name__} is made of this package's layers; it has nothing to accelerate")
        raise ValueError(f"{type(model).__name__} has no cell that accelerate knows. It knows {', '.join(_CELLS)}")
    for change in changes:
        change.make()
    return Accelerated(changes)


def undo(model: Any) -> list[str]:
    """Undoes :func:`accelerate` without its result: for a copy of an accelerated model, or where the result is gone.

    Args:
        model: as for :func:`accelerate`.

    Returns:
        The names of the restored modules; none if the model was not accelerated.

    Raises:
        TypeError: `model` is no module.
        RuntimeError: something else has replaced a changed method of a cell since. Nothing is restored.
    """
    modules = list(_named_modules(model))
    restored = [
        (name, module, attribute, value)
        for name, module in modules
        for attribute, value in vars(module).items()
        if type(value) is functools.partial and _is_ours(value)
    ]
    for name, module in modules if restored else []:
        _, cell = _known(type(module)) or (None, None)
        for attribute, patch in cell.patches.items() if cell else ():
            # accelerate() takes no cell whose methods have been replaced: it was replaced afterwards
            if patch.is_method and attribute in vars(module) and not _is_ours(vars(module)[attribute]):
                raise RuntimeError(_replaced(name, attribute))
    for _, module, attribute, value in restored:
        _restore(module, attribute, value)
    return list(dict.fromkeys(name for name, *_ in restored))


def _replaced(name: str, attribute: str) -> str:
    return f"{name}.{attribute} is not what accelerate set; undo first what replaced it"


def _named_modules(model: Any) -> Iterator[tuple[str, nn.Module]]:
    if isinstance(model, type):
        raise TypeError(f"model is the class {model.__name__}; it must be a torch.nn.Module, an instance")
    if not callable(getattr(model, "named_modules", None)):
        raise TypeError(f"model is of type {type(model).__name__}; it must be a torch.nn.Module")
    return model.named_modules()


class Accelerated:
    """What :func:`accelerate` changed. A context manager, which undoes that at its end.

    Attributes:
        changed: names of the changed modules, as in ``model.named_modules()``.
    """

    def __init__(self, changes: list[_Change]) -> None:
        self._changes = changes
        self.changed = list(dict.fromkeys(change.name for change in changes))

    def undo(self) -> None:
        """Restores the model. A second call does nothing.

        Raises:
            RuntimeError: something else has replaced a changed method since. Nothing is restored.
        """
        for change in self._changes:
            if not (change.is_in_place() or change.is_undone()):
                raise RuntimeError(_replaced(change.name, change.attribute))
        for change in self._changes:
            if change.is_in_place():
                _restore(change.module, change.attribute, change.new)
        self._changes = []

    def __enter__(self) -> Accelerated:
        if not self._changes:
            raise RuntimeError("what accelerate changed has been undone; call accelerate(model) again")
        return self

    def __exit__(self, *args: Any) -> None:
        self.undo()

    def __repr__(self) -> str:
        state = "" if self._changes else ", undone"
        return f"Accelerated({len(self.changed)} modules{state})"


def _replacement(module: nn.Module, attribute: str, patch: _Patch) -> Any:
    """A new entry of a module's ``__dict__``. A method's first argument is bound to the module.

    That of a copied or unpickled module is bound to the copy. A closure would read the weights of the first module; a
    bound method is unpickled as what its name stands for in the class. A class derived from partial takes 0.2 us more
    for a call.
    """
    new: Any = functools.partial(patch.function, module) if patch.is_method else functools.partial(patch.function)
    new.old = module.__dict__.get(attribute)  # None if there was none
    new.__module__ = __name__  # for _is_ours
    return new


def _restore(module: nn.Module, attribute: str, new: Any) -> None:
    if new.old is None:
        del module.__dict__[attribute]
    else:
        module.__dict__[attribute] = new.old


class _Change:
    """One entry of a module's ``__dict__``."""

    def __init__(self, name: str, module: nn.Module, attribute: str, patch: _Patch) -> None:
        self.name, self.module, self.attribute = name, module, attribute
        self.new = _replacement(module, attribute, patch)

    def make(self) -> None:
        self.module.__dict__[self.attribute] = self.new

    def is_in_place(self) -> bool:
        return self.module.__dict__.get(self.attribute) is self.new

    def is_undone(self) -> bool:
        return self.module.__dict__.get(self.attribute) is self.new.old


@dataclass(frozen=True)
class _Patch:
    function: Callable[..., Any]
    is_method: bool = True


@dataclass(frozen=True)
class _Cell:
    """How a known class is changed: new entries of an instance's ``__dict__``, and a check that raises ValueError."""

    patches: dict[str, _Patch]
    check: Callable[[Any], None]


def _known(kind: type) -> tuple[type, _Cell] | None:
    """The known class among the bases of `kind`."""
    for base in kind.__mro__:
        cell = _CELLS.get(f"{base.__module__}.{base.__qualname__}")
        if cell is not None:
            return base, cell
    return None


def _layer(module: nn.Module) -> _Patch | None:
    """The forward of a layer that is known as a whole: one of exactly that class, with its class's own forward."""
    kind = type(module)
    layer = _LAYERS.get(f"{kind.__module__}.{kind.__qualname__}")
    if layer is None or "forward" in module.__dict__ or kind.forward.__module__ != kind.__module__:
        return None
    return layer


def _check(name: str, module: nn.Module, original: type, cell: _Cell) -> None:
    what = f"{name or 'the model'} ({type(module).__name__})"
    for attribute, patch in cell.patches.items():
        if not patch.is_method:
            continue
        if attribute in module.__dict__:
            if _is_ours(module.__dict__[attribute]):
                raise ValueError(f"{what}: its {attribute} is accelerated already. {_UNDO}")
            raise ValueError(
                f"{what}: its {attribute} has been replaced; it must be that of its class. Undo that first"
            )
        if getattr(type(module), attribute) is not getattr(original, attribute):
            raise ValueError(f"{what}: its class has another {attribute} than {original.__qualname__}")
    try:
        cell.check(module)
    except ValueError as error:
        raise ValueError(f"{what}: {error}") from None


_UNDO = "flash_xlstm.integrations.undo(model) undoes that"


def _is_ours(function: Any) -> bool:
    return getattr(function, "__module__", "").startswith(__package__ or "flash_xlstm.integrations")


# mlstm_kernels and transformers


class _TransformersBackend:
    """transformers' ``xLSTMBackend`` has other names for the arguments of ``mLSTMBackend``."""

    def forward(
        self: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        igate: Tensor,
        fgate: Tensor,
        c_initial: Tensor | None = None,
        n_initial: Tensor | None = None,
        m_initial: Tensor | None = None,
        return_last_states: bool | None = None,
        mode: Literal["train", "inference"] | None = None,
    ) -> Any:
        states = c_initial, n_initial, m_initial
        return run_backend(self.config, query, key, value, igate, fgate, states, return_last_states, mode, False)


def _check_backend(module: Any) -> None:
    check_config(module.config)


def _check_transformers_backend(module: Any) -> None:
    check_common(module.config)  # it has kernels of its own, whatever their names in the configuration


# xlstm's block stack


def _mlstm_sequence(
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    igate_preact: Tensor,
    fgate_preact: Tensor,
    lower_triangular_matrix: Tensor | None = None,  # always causal
    eps: float = 1e-6,
) -> Any:
    i, f = igate_preact.squeeze(-1), fgate_preact.squeeze(-1)
    return _cells.mlstm(
        queries, keys, values, i, f, (None, None, None), eps=eps, return_last_states=False, kernel_dtype=None
    )


def _mlstm_step(
    c_state: Tensor,
    n_state: Tensor,
    m_state: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    igate_preact: Tensor,
    fgate_preact: Tensor,
    eps: float = 1e-6,
) -> Any:
    # The package keeps the scale in k, and so in its states.
    q, k, v = (t.squeeze(2) for t in (q, k, v))
    h, (c, n, m) = _cells.mlstm_step(
        q, k * k.shape[-1] ** -0.5, v, igate_preact.squeeze(-1), fgate_preact.squeeze(-1),
        (c_state, n_state.squeeze(-1), m_state.squeeze(-1)), eps=eps, scale=1.0,
    )  # fmt: skip
    return h.unsqueeze(2), (c.to(q.dtype), n.unsqueeze(-1).to(q.dtype), m.unsqueeze(-1).to(q.dtype))


def _check_mlstm_cell(module: Any) -> None:
    home = "xlstm.blocks.mlstm.backends"
    for attribute, known in (
        ("backend_fn", ("parallel_stabilized_simple", "chunkwise_simple")),
        ("backend_fn_step", ("recurrent_step_stabilized_simple",)),
    ):
        function = getattr(module, attribute)
        if _is_ours(function):
            raise ValueError(f"its {attribute} is accelerated already. {_UNDO}")
        if getattr(function, "__module__", "") != home or getattr(function, "__name__", "") not in known:
            raise ValueError(f"its {attribute} is {function}; it must be {' or '.join(known)} of {home}")


class _NxaiSlstmCell:
    """xlstm's ``sLSTMCell_vanilla`` and ``sLSTMCell_cuda``."""

    def forward(self: Any, input: Tensor, state: Tensor | None = None, lengths: Any = None) -> tuple[Tensor, Tensor]:
        # The package does not read `lengths`.
        self._check_input(input)
        config = self.config
        heads, dim = config.num_heads, config.head_dim
        is_cuda = _is_cuda_cell(self)
        dtype = input.dtype
        if is_cuda and config.enable_automatic_mixed_precision:
            input = input.to(config.torch_dtype_w)
        x = input.view(*input.shape[:2], 4, heads, dim)
        if config.input_shape == "SBGNH":
            x = x.transpose(0, 1)
        layout = "cuda" if is_cuda else "vanilla"
        R, b = _weights_of_op(layout, self._recurrent_kernel_, self._bias_, heads, dim)
        if state is not None:
            state = state.view(4, -1, heads, dim)
        h, last = _cells.slstm(x, R, b, state, clip=_clip(config) if is_cuda else None)
        if is_cuda and torch.is_autocast_enabled():
            dtype = config.torch_dtype_s
        return _in_shape(h.to(dtype), config.output_shape), last.flatten(2).to(dtype)


def _is_cuda_cell(module: Any) -> bool:
    # By the weights' shape, (heads, in, gates x out) or (heads, gates x out, in), which torch.compile can see.
    return module._recurrent_kernel_.shape[1] == module.config.head_dim


def _clip(config: Any) -> float | None:
    return _NOTHING if config.gradient_recurrent_cut else config.gradient_recurrent_clipval


def _in_shape(h: Tensor, shape: str) -> Tensor:
    """h (batch, seq, heads, dim) in a shape of xlstm's, in whose letters N is the heads and H the units."""
    if shape == "BNSH":
        return h.transpose(1, 2)
    if shape == "BSH":
        return h.flatten(2)
    return h.transpose(0, 1).flatten(2) if shape == "SBH" else h.transpose(0, 1)


def _check_slstm_cell(module: Any) -> None:
    config = module.config
    _check_function(config)
    if not _is_cuda_cell(module):
        return  # the vanilla backend reads none of what follows
    if config.constants:
        raise ValueError(f"its constants are {config.constants}; they must be empty")
    clip = config.gradient_recurrent_clipval
    if clip is not None and clip < 1:
        raise ValueError(
            f"its gradient_recurrent_clipval is {clip}; it must be at least 1: the package's kernel clips the output "
            "by it too, which from 1 on changes nothing"
        )


def _check_function(config: Any) -> None:
    if config.function != "slstm":
        raise ValueError(f"its function is {config.function!r}; it must be 'slstm'")


# TiRex-2 and TiRex


class _Tirex2Slstm:
    """TiRex-2's ``sLSTMFlashRNNLayer``."""

    def slstm_flashrnn(
        self: Any, Wx: Tensor, R: Tensor, b: Tensor, config: Any, states: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        # R (heads, in, gates, out), b (heads, gates, dim), states (4, batch, 1, heads, dim). The layer reads the first
        # state of the first result only, the output.
        x = Wx.to(kernel_dtype_of(config, Wx.dtype))
        state = None if states is None else states.squeeze(2)
        h, last = _cells.slstm(x, R.permute(2, 0, 3, 1), b.transpose(0, 1), state)
        return h.unsqueeze(0), last.unsqueeze(2).to(h.dtype)


def _check_tirex2(module: Any) -> None:
    config = module.config
    _check_function(config)
    for name, wanted in (("recurrent_shape", "HPGD"), ("bias_shape", "HGD")):
        if getattr(config, name) != wanted:
            raise ValueError(f"its {name} is {getattr(config, name)!r}; it must be {wanted!r}")


class _TirexSlstmCell:
    """TiRex's ``sLSTMCell``, whose parameters have the layout of xlstm's cuda backend."""

    def forward(self: Any, input: Tensor, state: Tensor | None) -> tuple[Tensor, Tensor]:
        config = self.config
        heads, dim = config.num_heads, config.head_dim
        # Both backends compute in bfloat16.
        x = input.to(torch.bfloat16).view(*input.shape[:2], 4, heads, dim)
        R, b = _weights_of_op("cuda", self._recurrent_kernel_, self._bias_, heads, dim)
        if state is not None:
            state = state.view(4, -1, heads, dim)
        h, last = _cells.slstm(x, R, b, state)
        return h.transpose(1, 2).to(input.dtype), last.flatten(2).to(input.dtype)


def _check_tirex(module: Any) -> None:
    config = module.config
    for name in ("num_gates", "num_states"):
        if getattr(config, name) != 4:
            raise ValueError(f"its {name} is {getattr(config, name)}; it must be 4")


def _method(holder: type, name: str = "forward") -> dict[str, _Patch]:
    return {name: _Patch(vars(holder)[name])}


_CELLS = {
    "transformers.models.xlstm.modeling_xlstm.xLSTMBackend": _Cell(
        _method(_TransformersBackend), _check_transformers_backend
    ),
    "mlstm_kernels.torch.backend_module.mLSTMBackend": _Cell(_method(mLSTMBackend), _check_backend),
    "xlstm.blocks.mlstm.cell.mLSTMCell": _Cell(
        {"backend_fn": _Patch(_mlstm_sequence, False), "backend_fn_step": _Patch(_mlstm_step, False)},
        _check_mlstm_cell,
    ),
    "xlstm.blocks.slstm.cell.sLSTMCell_vanilla": _Cell(_method(_NxaiSlstmCell), _check_slstm_cell),
    "xlstm.blocks.slstm.cell.sLSTMCell_cuda": _Cell(_method(_NxaiSlstmCell), _check_slstm_cell),
    "tirex2.model.component.flashrnn_slstm.sLSTMFlashRNNLayer": _Cell(
        _method(_Tirex2Slstm, "slstm_flashrnn"), _check_tirex2
    ),
    "tirex.models.slstm.cell.sLSTMCell": _Cell(_method(_TirexSlstmCell), _check_tirex),
}

# Layers around cells, whose products, norms and gates are done beside the cell's op.
_LAYERS = {
    _tirex.SLSTM: _Patch(_tirex.Slstm.forward),
    _tirex.MLSTM: _Patch(_tirex.Mlstm.forward),
    _tirex.TIREX_SLSTM: _Patch(_tirex.TirexSlstm.forward),
}
