"""Linear layers that read the same input, kept apart ("single") or stacked into one ("fused")."""

from __future__ import annotations

from collections.abc import MutableMapping
from typing import Any

import torch
from torch import Tensor, nn

from flash_xlstm.nn.linear import linear

WEIGHT_MODES = ("single", "fused")


def convert_weight_mode(
    state_dict: MutableMapping[str, Tensor], prefix: str, groups: dict[str, dict[str, int]], mode: str
) -> None:
    """Renames, and stacks or splits, the entries of one module in a state dict, in place.

    Args:
        state_dict: names to tensors. Entries already in `mode`, incomplete groups and other entries stay as
            they are.
        prefix: the module's name with its dot, or empty.
        groups: for each fused linear layer the single ones it stacks, in order, with their output sizes.
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
                    continue  # left for load_state_dict to report
                del state_dict[whole]
                # Clones: slices would share storage, which savers refuse and which keeps the whole alive.
                state_dict.update(
                    (name, t.clone()) for name, t in zip(names, stacked.split(list(parts.values())), strict=True)
                )


class FusableProjections(nn.Module):
    """A module whose input projections come in either weight mode.

    ``load_state_dict`` accepts a state dict in either mode and converts it. Subclasses call
    :meth:`_build_projections` and read them with :meth:`_project`.

    Attributes:
        projection_groups: for each fused layer, the single layers it stacks, in order, with their output
            sizes.
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
        """The layers that there are of a group: the fused one, or the single ones."""
        names = [group] if self.weight_mode == "fused" else self.projection_groups[group]
        return [self._modules[name] for name in names]  # type: ignore[misc]

    def _project(self, x: Tensor, group: str) -> tuple[Tensor, ...]:
        """The outputs of a group's single layers; views of one tensor where they are fused."""
        parts = self.projection_groups[group]
        if self.weight_mode == "fused":
            return linear(self.get_submodule(group), x).split(list(parts.values()), dim=-1)
        return tuple(linear(self.get_submodule(name), x) for name in parts)

    def check_weight_mode(self, mode: str) -> None:
        """Checks that :meth:`set_weight_mode` can do what it is asked.

        Raises:
            ValueError: `mode` is unknown, or the weights are not in memory, or not those of plain linear layers.
        """
        if mode not in WEIGHT_MODES:
            raise ValueError(f"mode is {mode!r}; it must be one of {', '.join(WEIGHT_MODES)}")
        if mode == self.weight_mode:
            return
        for fused, parts in self.projection_groups.items():
            for name in parts if mode == "fused" else [fused]:
                layer = self.get_submodule(name)
                if type(layer) is not nn.Linear:
                    raise ValueError(
                        f"{name} is a {type(layer).__name__}; it must be a Linear to change the weight mode"
                    )
                if layer.weight.is_meta:
                    raise ValueError(
                        f"the weights of {name} are offloaded (on the meta device); they must be in memory to change "
                        "the weight mode: load the checkpoint in its own weight mode"
                    )

    def set_weight_mode(self, mode: str) -> None:
        """Stacks or splits the projections in place. Parameters become new objects: call it before making an
        optimizer.

        Raises:
            ValueError: `mode` is unknown, or the weights are not in memory (offloaded, on the meta device).
        """
        if mode not in WEIGHT_MODES:
            raise ValueError(f"mode is {mode!r}; it must be one of {', '.join(WEIGHT_MODES)}")
        if mode == self.weight_mode:
            return
        for fused, parts in self.projection_groups.items():
            old_names, new_sizes = (
                (list(parts), {fused: sum(parts.values())}) if mode == "fused" else ([fused], dict(parts))
            )
            old = {name: self.get_submodule(name) for name in old_names}
            tensors = {f"{n}.{kind}": t.data for n, layer in old.items() for kind, t in layer.named_parameters()}
            if any(t.is_meta for t in tensors.values()):
                raise ValueError(
                    f"the weights of {', '.join(old_names)} are offloaded (on the meta device); they must be "
                    "in memory to change the weight mode: load the checkpoint in its own weight mode"
                )
            first: Any = next(iter(old.values()))
            needs_grad = first.weight.requires_grad
            convert_weight_mode(tensors, "", {fused: parts}, mode)
            for name in old_names:
                delattr(self, name)
            for name, size in new_sizes.items():
                layer = nn.Linear(first.in_features, size, bias=first.bias is not None, device="meta")
                layer.load_state_dict(
                    {kind: tensors.pop(f"{name}.{kind}") for kind, _ in list(layer.named_parameters())},
                    assign=True,
                )
                self.add_module(name, layer.requires_grad_(needs_grad).train(self.training))
        self.weight_mode = mode


def _convert_on_load(module: nn.Module, state_dict: dict[str, Tensor], prefix: str, *args: Any) -> None:
    assert isinstance(module, FusableProjections)
    convert_weight_mode(state_dict, prefix, module.projection_groups, module.weight_mode)
