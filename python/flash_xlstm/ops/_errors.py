"""What is wrong with a call that ended in an error, with the argument's name.

The operators name the arguments that they refuse. Some never get there: a list where a tensor belongs ends in the
dispatcher, an int in a state in an AttributeError. A function's annotations say what its arguments must be; they are
looked at where a call has failed, and cost a good call nothing.
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

_PARTS = {2: "cn", 3: "cnm", 4: "hcnm"}  # of a state, by how many it has
_KINDS = {"ValueError": ValueError, "TypeError": TypeError}


def explain(error: Exception, function: Callable[..., Any], given: dict[str, Any]) -> Exception:
    """The error that a call of `function` shall end in, which ended in `error`.

    Args:
        given: the arguments by name, as ``locals()`` has them.

    Returns:
        A TypeError or ValueError that names the argument, where its type or value cannot be meant; else `error`.
    """
    for name, hint in typing.get_type_hints(function).items():
        if name in given:
            for wrong in _wrong(name, given[name], hint):
                return wrong
    if type(error) is RuntimeError:  # a torch that hands on no exception's type
        kind, message = _C.argument_error()
        if message and message in str(error):
            return _KINDS[kind](message)
    return error


def _wrong(name: str, value: Any, hint: Any) -> Iterator[Exception]:
    """What is wrong with the argument `name`, if anything."""
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
                if each is not None:  # what that means, the operators say
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
