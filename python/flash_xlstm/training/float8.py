"""Products of large linear layers in float8, by torchao."""

from __future__ import annotations

import dataclasses

import torch
from torch import nn

RECIPES = ("tensorwise", "rowwise", "rowwise_with_gw_hp")

# What stays as it is: the gates, whose exponentials a rounding to float8 would move, and the head.
_KEPT = ("igate_preact", "fgate_preact", "ifgate_preact", "igate", "fgate", "lm_head")
_MULTIPLE = 16  # of both sizes, for the GPU's float8 products
_CAPABILITY = (8, 9)


def convert_to_float8(model: nn.Module, recipe: str = "rowwise", *, emulate: bool = False) -> list[str]:
    """Exchanges the linear layers of a model, in place, for torchao's, which multiply in float8 forward and backward.

    Parameters stay the same objects, so that an optimizer may be made before or after; so do the names in a state dict.
    The head, the input and forget gates, subclasses of :class:`torch.nn.Linear`, and layers of which a size is no
    multiple of 16 stay as they are. The number of tokens in a step (batch times seq) must be a multiple of 16 too.
    Compile the model afterwards: torchao's rounding to float8, without torch.compile, takes longer than products save.

    With "rowwise" the 7B's blocks make these products themselves in training, by torchao's scheme. Its layers hold
    the weights, and multiply where a block runs them one by one.

    Args:
        model: any module; :class:`flash_xlstm.models.xLSTMForCausalLM`, say, in either weight mode.
        recipe: how values are scaled, by torchao's names: "tensorwise" (fastest), "rowwise", or "rowwise_with_gw_hp"
            (weights' gradients not in float8).
        emulate: round to float8 and multiply in the layers' own dtype: slow, and runs anywhere.

    Returns:
        The names of the exchanged layers.

    Raises:
        ImportError: torchao is not installed (``pip install "flash-xlstm[float8]"``).
        ValueError: the recipe is unknown, no layer fits, or the model is on a GPU without float8 products (compute
            capability below 8.9) and `emulate` is false.
    """
    if recipe not in RECIPES:
        raise ValueError(f"recipe is {recipe!r}; it must be one of {', '.join(RECIPES)}")
    layers = {name: layer for name, layer in model.named_modules() if _fits(model, name, layer)}
    if not layers:
        raise ValueError(
            f"model has no linear layer for float8: it must have a torch.nn.Linear with sizes that are multiples of "
            f"{_MULTIPLE}, other than {', '.join(_KEPT)}"
        )
    for device in {layer.weight.device for layer in layers.values()}:
        if device.type == "cuda" and not emulate and torch.cuda.get_device_capability(device) < _CAPABILITY:
            found = ".".join(map(str, torch.cuda.get_device_capability(device)))
            raise ValueError(
                f"model is on {device}, a {torch.cuda.get_device_name(device)} of compute capability {found}; float8 "
                f"products need {'.'.join(map(str, _CAPABILITY))} or more (emulate=True runs anywhere, slowly)"
            )
    try:
        from torchao.float8 import Float8LinearConfig, convert_to_float8_training
    except ImportError as error:
        raise ImportError(f'float8 needs torchao: pip install "flash-xlstm[float8]" ({error})') from error
    config = dataclasses.replace(Float8LinearConfig.from_recipe_name(recipe), emulate=emulate)
    convert_to_float8_training(model, module_filter_fn=lambda _, name: name in layers, config=config)
    return list(layers)


def _fits(model: nn.Module, name: str, layer: nn.Module) -> bool:
    return (
        type(layer) is nn.Linear
        and layer is not model
        and name.rpartition(".")[2] not in _KEPT
        and not (layer.in_features % _MULTIPLE or layer.out_features % _MULTIPLE)
        and layer is not _head(model)
    )


def _head(model: nn.Module) -> nn.Module | None:
    """The head of a model of transformers, whatever its name."""
    get = getattr(model, "get_output_embeddings", None)
    return get() if callable(get) else None
