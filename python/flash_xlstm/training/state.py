"""The contents of ``trainer_state.pt``, and their checks before a run is resumed."""

from __future__ import annotations

import hashlib
import json
import math
from dataclasses import fields
from typing import Any

import torch
from torch import Tensor

from flash_xlstm.training.errors import short
from flash_xlstm.training.metrics import COLUMNS
from flash_xlstm.training.settings import KEPT, RunOptions, TrainSettings, check

_PLAIN = ("format", "step", "settings", "options", "fingerprint", "history")
_KEYS = {
    1: {*_PLAIN, "optimizer", "random", "cuda_random"},
    2: {*_PLAIN, "optimizer", "random", "cuda_random", "digest"},
}
FORMAT = max(_KEYS)
_FLOAT32_STEPS = 2**24  # the optimizer counts steps in float32, which stops here


def digest(state: dict[str, Any]) -> str:
    """A hash of all but the tensors. It detects changed values that no range check can, such as another --steps."""
    return hashlib.sha256(json.dumps([state[name] for name in _PLAIN], sort_keys=True).encode()).hexdigest()


def check_state(state: Any, step: int) -> tuple[TrainSettings, dict[str, Any]]:
    """Checks a state, without the optimizer's, and returns its settings and the options that it keeps.

    Args:
        state: the file's contents.
        step: of the checkpoint, from its folder's name.

    Raises:
        ValueError: naming the entry, what it is and what it must be.
    """
    if type(state) is not dict or type(state.get("format")) is not int or state["format"] not in _KEYS:
        raise ValueError("it is of another version of flash-xlstm, or corrupt")
    _check_names("it", state, _KEYS[state["format"]])
    settings, options = state["settings"], state["options"]
    _check_fields("settings", settings, [field.name for field in fields(TrainSettings)], TrainSettings())
    _check_fields("options", options, KEPT, RunOptions())
    if type(state["step"]) is not int or state["step"] != step or not 0 <= step <= settings["steps"]:
        raise ValueError(
            f"step is {short(state['step'])}; it must be the {step} of the folder's name, and at most steps, "
            f"{settings['steps']}"
        )
    if type(state["fingerprint"]) is not str:
        raise ValueError(f"fingerprint is {short(state['fingerprint'])}; it must be a string")
    _check_history(state["history"], step)
    for name in ("random", "cuda_random"):
        value = state[name]
        if not (name == "cuda_random" and value is None) and not is_plain_tensor(value, torch.uint8, None):
            raise ValueError(f"{name} is {short(value)}; it must be a row of bytes")
    if state["format"] > 1 and state["digest"] != digest(state):
        raise ValueError(f"its values are not those that were saved ({', '.join(_PLAIN)})")
    return TrainSettings(**settings), options


def is_plain_tensor(value: object, dtype: torch.dtype, shape: torch.Size | None) -> bool:
    """Whether a value is a tensor on the CPU of that dtype and shape (None: any of one dimension) whose elements do not
    overlap. A write to an overlapping element, of stride 0 for example, changes several."""
    return (
        isinstance(value, Tensor)
        and type(value) is Tensor
        and value.layout == torch.strided
        and value.device.type == "cpu"
        and value.dtype == dtype
        and (value.dim() == 1 if shape is None else value.shape == shape)
        and value.is_contiguous()
        and not value.is_neg()
        and value.untyped_storage().nbytes() == value.nbytes
    )


def _check_names(what: str, values: dict[Any, Any], names: set[str]) -> None:
    for name in sorted(names - values.keys()):
        raise ValueError(f"{what} has no {name}")
    for name in values.keys() - names:
        raise ValueError(f"{what} has {short(name)}, which is unknown")


def _check_fields(what: str, values: Any, names: Any, defaults: Any) -> None:
    if type(values) is not dict:
        raise ValueError(f"{what} is {short(values)}; it must be a dict")
    _check_names(what, values, set(names))
    for name, value in values.items():
        check(name, value, optional=getattr(defaults, name) is None)


def _check_history(history: Any, step: int) -> None:
    rule = "it must be rows of finite numbers, from step 0 with its held-out bits per byte to the state's step"
    if type(history) is not list or not all(type(row) is dict for row in history):
        raise ValueError(f"history is {short(history)}; {rule}")
    last = 0
    for number, row in enumerate(history):
        steps = row.get("step")
        if (
            not row.keys() <= set(COLUMNS)
            or type(steps) is not int
            or not last <= steps <= step
            or any(type(x) is not float or not 0 <= x < math.inf for name, x in row.items() if name != "step")
        ):
            raise ValueError(f"row {number} of history is {short(row)}; {rule}")
        last = steps
    if not history or history[0]["step"] != 0 or "held_out_bits_per_byte" not in history[0] or last != step:
        raise ValueError(f"history has the rows of other steps; {rule}")


def check_optimizer(saved: Any, optimizer: torch.optim.AdamW, step: int) -> dict[str, Any]:
    """The state dict to load into the optimizer of a resumed run.

    Args:
        saved: the state dict in the file.
        optimizer: a new one.
        step: optimizer steps done.

    Raises:
        ValueError: naming the entry, what it is and what it must be.
    """
    own = optimizer.state_dict()["param_groups"]
    if type(saved) is not dict or saved.keys() != {"state", "param_groups"}:
        raise ValueError(f"optimizer is {short(saved)}; it must be a dict of state and param_groups")
    groups, entries = saved["param_groups"], saved["state"]
    if type(groups) is not list or len(groups) != len(own) or not all(type(group) is dict for group in groups):
        raise ValueError(f"the optimizer's param_groups are {short(groups)}; they must be {len(own)} dicts")
    for number, (group, mine) in enumerate(zip(groups, own, strict=True)):
        for name, value in mine.items():  # names differ between torch's releases: the new groups are kept
            found = group.get(name, value)
            if name != "lr" and repr(found) != repr(value):  # each step sets lr
                raise ValueError(f"{name} of the optimizer's group {number} is {short(found)}; it must be {value}")
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    if type(entries) is not dict or entries.keys() != set(range(len(parameters) if step else 0)):
        raise ValueError(f"the optimizer's state must be that of {len(parameters)} tensors, and at step 0 of none")
    addresses: set[int] = set()
    for number, parameter in enumerate(parameters if step else []):
        _check_moments(f"the optimizer's state of tensor {number}", entries[number], parameter.shape, step)
        addresses.update(tensor.data_ptr() for tensor in entries[number].values())
    if len(addresses) != 3 * len(entries):
        raise ValueError("tensors of the optimizer's state share memory")
    return {"state": entries, "param_groups": own}


def _check_moments(what: str, values: Any, shape: torch.Size, step: int) -> None:
    if type(values) is not dict:
        raise ValueError(f"{what} is {short(values)}; it must be a dict")
    _check_names(what, values, {"step", "exp_avg", "exp_avg_sq"})
    for name, wanted, low in (("step", torch.Size(), 0.0), ("exp_avg", shape, -math.inf), ("exp_avg_sq", shape, 0.0)):
        value = values[name]
        if not is_plain_tensor(value, torch.float32, wanted):
            raise ValueError(f"{what}: {name} is {short(value)}; it must be of float32 and shape {tuple(wanted)}")
        smallest, largest = map(float, value.aminmax())
        if not (low <= smallest and -math.inf < smallest and largest < math.inf):
            raise ValueError(
                f"{what}: {name} has values from {smallest} to {largest}; they must be finite, and squares not negative"
            )
    if float(values["step"]) != min(step, _FLOAT32_STEPS):
        raise ValueError(f"{what}: step is {float(values['step'])}; it must be the run's, {step}")
