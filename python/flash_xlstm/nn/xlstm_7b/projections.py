"""Linear layers that read the same input, as separate layers ("single") or stacked into one ("fused")."""

from __future__ import annotations

from collections.abc import Iterable, MutableMapping
from typing import Any

import torch
from torch import Tensor, nn

from flash_xlstm.nn.linear import linear, linears, unchanged

WEIGHT_MODES = ("single", "fused")


def convert_weight_mode(
    state_dict: MutableMapping[str, Tensor], prefix: str, groups: dict[str, dict[str, int]], mode: str
) -> None:
    """Stacks or splits the entries of one module in a state dict, and renames them. Works in place.

    Args:
        state_dict: tensors by name. Entries already in `mode`, incomplete groups and other entries are left alone.
        prefix: the module's name and a dot, or empty.
        groups: for each fused layer, the single layers it stacks, in order, with their output sizes.
        mode: "single" or "fused".
    """
    for fused, parts in groups.items():
        for kind in ("weight", "bias"):
            whole = f"{prefix}{fused}.{kind}"
            names = [f"{prefix}{part}.{kind}" for part in parts]
            if mode == "fused" and all(name in state_dict for name in names):
                state_dict[whole] = torch.cat([state_dict.pop(name) for name in names])
            elif mode == "single" and whole in state_dict:
                stacked = state_dict[whole]
                if stacked.shape[0] != sum(parts.values()):
                    continue  # load_state_dict reports it
                del state_dict[whole]
                # Cloned: slices would share storage. Savers refuse that, and it keeps the whole tensor alive.
                state_dict.update(
                    (name, t.clone()) for name, t in zip(names, stacked.split(list(parts.values())), strict=True)
                )


class FusableProjections(nn.Module):
    """A module whose input projections have one of the two weight modes.

    ``load_state_dict`` accepts a state dict in either mode and converts it. Subclasses make their projections with
    :meth:`_build_projections` and run them with :meth:`_project`.

    Attributes:
        projection_groups: for each fused layer, the single layers it stacks, in order, with their output sizes.
        weight_mode: "single" or "fused".
    """

    def __init__(self, weight_mode: str) -> None:
        super().__init__()
        if weight_mode not in WEIGHT_MODES:
            raise ValueError(f"weight_mode is {weight_mode!r}; it must be one of {', '.join(WEIGHT_MODES)}")
        self.weight_mode = weight_mode
        self.projection_groups: dict[str, dict[str, int]] = {}
        self.register_load_state_dict_pre_hook(_convert_on_load)

    def _build_projections(self, in_features: int, groups: dict[str, dict[str, int]], biases: dict[str, bool]) -> None:
        self.projection_groups = groups
        for fused, parts in groups.items():
            layers = {fused: sum(parts.values())} if self.weight_mode == "fused" else parts
            for name, size in layers.items():
                self.add_module(name, nn.Linear(in_features, size, bias=biases[fused]))

    def projections(self, group: str) -> list[nn.Module]:
        """The layers of a group: the fused one, or the single ones."""
        names = [group] if self.weight_mode == "fused" else self.projection_groups[group]
        return [self._modules[name] for name in names]  # type: ignore[misc]

    def _project(self, x: Tensor, group: str) -> tuple[Tensor, ...]:
        """The outputs of a group's single layers. With fused weights they are views of one tensor."""
        parts = self.projection_groups[group]
        if self.weight_mode == "fused":
            return linear(self.get_submodule(group), x).split(list(parts.values()), dim=-1)
        return linears(self.projections(group), x)

    def set_weight_mode(self, mode: str) -> None:
        """Stacks or splits the projections in place. Parameters become new objects: call it before making an
        optimizer.

        Raises:
            ValueError: as :func:`check_weight_mode`. Nothing is changed then.
        """
        if not check_weight_mode(self, mode):
            return
        new: dict[str, nn.Module] = {}  # all are made before the first is replaced
        old: list[str] = []
        for fused, parts in self.projection_groups.items():
            names = _names(fused, parts, self.weight_mode)
            old += names
            layers = [self.get_submodule(name) for name in names]
            named = {f"{n}.{kind}": p for n, part in zip(names, layers, strict=True) for kind, p in _given(part)}
            tensors = {name: p.detach() for name, p in named.items()}
            gradients = {name: p.grad for name, p in named.items() if p.grad is not None}
            for converted in (tensors, gradients):
                convert_weight_mode(converted, "", {fused: parts}, mode)
            first: Any = layers[0]
            for name, size in _names(fused, parts, mode).items():
                layer = nn.Linear(first.in_features, size, bias=first.bias is not None, device="meta")
                for kind, old_p in _given(first):
                    p = nn.Parameter(tensors[f"{name}.{kind}"], requires_grad=old_p.requires_grad)
                    p.grad = gradients.get(f"{name}.{kind}")
                    setattr(layer, kind, p)
                new[name] = _with_accelerate_hook(layer.train(self.training), first)
        for name in old:
            delattr(self, name)
        for name, part in new.items():
            self.add_module(name, part)
        self.weight_mode = mode


def check_weight_mode(model: nn.Module, mode: str) -> list[FusableProjections]:
    """Checks that the projections in `model` can be stacked or split. Changes nothing.

    Returns:
        The modules, perhaps `model` itself among them, that are not in `mode` yet. They are for
        :meth:`FusableProjections.set_weight_mode`.

    Raises:
        ValueError: `mode` is unknown, or a layer cannot be converted without a loss. The message names the layer. It is
            not a plain :class:`torch.nn.Linear` (but an adapter around one, or quantized), is offloaded, has hooks, or
            shares parameters. Or the layers of a group differ in in_features, dtype, device, requires_grad, hooks or
            whether they have a bias.
    """
    if mode not in WEIGHT_MODES:
        raise ValueError(f"mode is {mode!r}; it must be one of {', '.join(WEIGHT_MODES)}")
    owners: dict[int, list[str]] = {}
    found = []
    for path, module in model.named_modules():
        prefix = path and f"{path}."
        for kind, p in _given(module):
            owners.setdefault(id(p), []).append(prefix + kind)
        if isinstance(module, FusableProjections) and module.weight_mode != mode:
            found.append((prefix, module))
    for prefix, module in found:
        for fused, parts in module.projection_groups.items():
            sizes = _names(fused, parts, module.weight_mode)
            layers = {prefix + name: module._modules.get(name) for name in sizes}
            for (name, layer), size in zip(layers.items(), sizes.values(), strict=True):
                _check_layer(name, layer, size, owners)
            _check_alike(layers, prefix + fused)
    return [module for _, module in found]


def _names(fused: str, parts: dict[str, int], mode: str) -> dict[str, int]:
    """The layers of a group in a weight mode, with their output sizes."""
    return {fused: sum(parts.values())} if mode == "fused" else parts


def _given(module: nn.Module | None) -> list[tuple[str, nn.Parameter]]:
    """The parameters of a module itself, without those of its submodules."""
    return [] if module is None else [(kind, p) for kind, p in module._parameters.items() if p is not None]


def _check_layer(name: str, layer: Any, size: int, owners: dict[int, list[str]]) -> None:
    kind = f"{type(layer).__module__}.{type(layer).__qualname__}"
    if type(layer) is not nn.Linear:
        way = "merge or unload the adapter first" if hasattr(layer, "base_layer") else "exchange it first"
        raise ValueError(f"{name} is a {kind}; to change the weight mode it must be a torch.nn.Linear: {way}")
    for parameter, p in _given(layer):
        if type(p) is not nn.Parameter:
            of = f"{type(p).__module__}.{type(p).__qualname__}"
            raise ValueError(
                f"{name}.{parameter} is a {of}; to change the weight mode it must be a plain torch.nn.Parameter"
            )
        if p.is_meta:
            raise ValueError(
                f"the weights of {name} are offloaded (on the meta device); they must be in memory to change the "
                "weight mode: load the checkpoint in its own weight mode"
            )
        shared = [other for other in owners[id(p)] if other != f"{name}.{parameter}"]
        if shared:
            raise ValueError(
                f"{name}.{parameter} is shared with {', '.join(shared)}; changing the weight mode would untie them"
            )
        if p._backward_hooks or p._post_accumulate_grad_hooks:
            raise ValueError(f"{name}.{parameter} has hooks, which changing the weight mode would lose: remove them")
    if {parameter for parameter, _ in _given(layer)} - {"bias"} != {"weight"} or layer._buffers or layer._modules:
        raise ValueError(f"{name} must have a weight, a bias or none, and nothing else to change the weight mode")
    if layer.weight.shape != (size, layer.in_features):
        raise ValueError(
            f"{name}.weight has shape {tuple(layer.weight.shape)}; to change the weight mode it must be "
            f"({size}, {layer.in_features})"
        )
    hooks = any(value for attribute, value in vars(layer).items() if attribute.endswith("_hooks"))
    if hooks or not (unchanged(layer, nn.Linear) or _accelerate_hook(layer)):
        raise ValueError(
            f"{name} has hooks or a forward of its own, which changing the weight mode would lose: remove them first"
        )


def _check_alike(layers: dict[str, Any], fused: str) -> None:
    def differ(what: str, values: Iterable[Any]) -> None:
        values = list(values)
        if any(value != values[0] for value in values):
            each = ", ".join(f"{name}: {value}" for name, value in zip(layers, values, strict=True))
            raise ValueError(f"the parts of {fused} differ in {what} ({each}); to be stacked they must agree")

    parts = layers.values()
    differ("in_features", (part.in_features for part in parts))
    differ("having a bias", (part.bias is not None for part in parts))
    differ("having hooks of accelerate's", (_accelerate_hook(part) is not None for part in parts))
    for kind, _ in _given(next(iter(parts))):
        for what in ("requires_grad", "dtype", "device"):
            differ(f"{kind}.{what}", (getattr(getattr(part, kind), what) for part in parts))


def _accelerate_hook(layer: nn.Module) -> Any:
    """The hook with which accelerate moves a layer's inputs to its device, or None if it does more or there is none."""
    hook: Any = getattr(layer, "_hf_hook", None)
    return hook if type(hook).__name__ == "AlignDevicesHook" and not hook.offload else None


def _with_accelerate_hook(layer: nn.Module, old: nn.Module) -> nn.Module:
    hook = _accelerate_hook(old)
    if hook is None:
        return layer
    from accelerate.hooks import add_hook_to_module

    return add_hook_to_module(layer, hook)


def _convert_on_load(module: nn.Module, state_dict: dict[str, Tensor], prefix: str, *args: Any) -> None:
    assert isinstance(module, FusableProjections)
    convert_weight_mode(state_dict, prefix, module.projection_groups, module.weight_mode)
