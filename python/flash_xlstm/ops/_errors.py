"""Errors that name the wrong argument of a failed call.

The operators name the arguments that they refuse. Some wrong arguments fail earlier: a list in place of a tensor in the
dispatcher, an int in a state by an AttributeError. This module checks a failed call's arguments against the function's
annotations. A good call pays nothing.
"""

from __future__ import annotations

import collections.abc
import numbers
import reprlib
import types
import typing
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from flash_xlstm import _C

_PARTS = {2: "cn", 3: "cnm", 4: "hcnm"}  # names of a state's parts, by their number
_KINDS = {"ValueError": ValueError, "TypeError": TypeError}


def explain(error: Exception, function: Callable[..., Any], given: dict[str, Any]) -> Exception:
    """The error to raise for a call of `function` that raised `error`.

    Args:
        given: the arguments by name, from ``locals()``.

    Returns:
        A TypeError or ValueError that names the argument if its type or value is wrong; torch.OutOfMemoryError where a
        GPU's memory did not suffice; otherwise `error`.
    """
    for name, hint in typing.get_type_hints(function).items():
        if name in given:
            for wrong in _wrong(name, given[name], hint):
                return wrong
    if type(error) is RuntimeError:  # some releases of torch do not pass on an exception's type
        kind, message = _C.argument_error()
        if message and message in str(error):
            return _KINDS[kind](message)
        if "CUDA out of memory" in str(error):
            return torch.OutOfMemoryError(str(error))
    return error


def _wrong(name: str, value: Any, hint: Any) -> Iterator[Exception]:
    """The error of the argument `name`, or None."""
    or_none = ""
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        if value is None:
            return
        (hint,) = (kind for kind in typing.get_args(hint) if kind is not type(None))
        or_none = " or None"
    origin = typing.get_origin(hint)
    if hint is Tensor:
        yield from _wrong_tensor(name, value, or_none)
    elif hint is float or hint is int:
        yield from _wrong_number(name, value, hint, or_none)
    elif hint is bool and not isinstance(value, bool):
        yield TypeError(f"{name} is {_said(value)}; it must be True or False")
    elif hint is str and not isinstance(value, str):
        yield TypeError(f"{name} is {_said(value)}; it must be a string{or_none}")
    elif origin is tuple:
        kinds = typing.get_args(hint)
        parts = _PARTS[len(kinds)]
        if not isinstance(value, (tuple, list)) or len(value) != len(kinds):
            want = f"a tuple of {len(kinds)} tensors, ({', '.join(parts)})"
            yield TypeError(f"{name} is {_said(value)}; it must be {want}{or_none}")
        else:
            for part, each in zip(parts, value, strict=True):
                if each is not None:  # the operators define the message
                    yield from _wrong_tensor(f"{name} {part}", each, "")
    elif origin is collections.abc.Sequence:
        if not isinstance(value, (tuple, list)):
            yield TypeError(f"{name} is {_said(value)}; it must be a list of tensors{or_none}")
        else:
            for place, each in enumerate(value):
                yield from _wrong(f"{name}[{place}]", each, typing.get_args(hint)[0])


def _wrong_tensor(name: str, value: Any, or_none: str) -> Iterator[Exception]:
    if not isinstance(value, Tensor):
        yield TypeError(f"{name} is {_said(value)}; it must be a tensor{or_none}")
    elif value.is_quantized or value.is_nested or value.layout != torch.strided:
        kind = "quantized" if value.is_quantized else "nested" if value.is_nested else str(value.layout)[6:].lstrip("_")
        yield TypeError(f"{name} is a tensor that is {kind}; it must be an ordinary (dense, strided) one")


def _wrong_number(name: str, value: Any, kind: type, or_none: str) -> Iterator[Exception]:
    whole = kind is int
    wanted: type = numbers.Integral if whole else numbers.Real
    if not isinstance(value, wanted) or isinstance(value, bool):
        yield TypeError(f"{name} is {_said(value)}; it must be a {'whole ' if whole else ''}number{or_none}")
    elif whole and not -(2**63) <= value < 2**63:  # type: ignore[operator]
        yield ValueError(f"{name} is {_said(value)}; it must be a number of 64 bits{or_none}")
    elif not whole:
        try:
            float(value)  # type: ignore[arg-type]
        except OverflowError:
            yield ValueError(f"{name} is {_said(value)}; it must be a number that float32 holds{or_none}")


def _said(value: Any) -> str:
    if value is None or isinstance(value, (bool, numbers.Number, str)):
        return reprlib.repr(value)
    return f"of type {type(value).__name__}"
