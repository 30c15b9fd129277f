"""Modules under their names of release 0.1."""

from __future__ import annotations

import importlib
import pickle
import subprocess
import sys

import pytest

import flash_xlstm.nn
from flash_xlstm.nn import block_stack, xlstm_7b

OLD = {
    "blocks": "block_stack",
    **{f"blocks.{name}": f"block_stack.{name}"
       for name in ("configuration", "language_model", "layers", "mlstm", "slstm", "stack")},
    **{name: f"xlstm_7b.{name}" for name in ("block", "block_step", "feedforward", "mlstm", "norm", "projections")},
}  # fmt: skip


@pytest.fixture
def fresh(monkeypatch):
    """Restores the state before the first import of an old name."""
    for name in OLD:
        monkeypatch.delitem(sys.modules, f"flash_xlstm.nn.{name}", raising=False)
        if "." not in name:
            monkeypatch.delitem(vars(flash_xlstm.nn), name, raising=False)


@pytest.mark.parametrize("old", OLD)
def test_an_old_name_imports_the_same_module_with_a_warning(fresh, old):
    with pytest.warns(DeprecationWarning, match=f"flash_xlstm.nn.{old} is now flash_xlstm.nn.{OLD[old]}; "):
        module = importlib.import_module(f"flash_xlstm.nn.{old}")
    assert module is importlib.import_module(f"flash_xlstm.nn.{OLD[old]}")
    assert module.__name__ == module.__spec__.name == f"flash_xlstm.nn.{OLD[old]}"


def test_old_names_as_attributes(fresh):
    with pytest.warns(DeprecationWarning):
        assert flash_xlstm.nn.blocks is block_stack
    with pytest.warns(DeprecationWarning):
        from flash_xlstm.nn import norm
    assert norm.RMSNorm is xlstm_7b.RMSNorm
    with pytest.raises(AttributeError, match="has no attribute 'nonsense'"):
        _ = flash_xlstm.nn.nonsense
    with pytest.raises(ModuleNotFoundError):
        importlib.import_module("flash_xlstm.nn.blocks.nonsense")


def test_the_warning_points_at_the_import(fresh):
    with pytest.warns(DeprecationWarning) as caught:
        from flash_xlstm.nn.blocks import mLSTMLayer
    assert mLSTMLayer is block_stack.mLSTMLayer
    assert [warning.filename for warning in caught] == [__file__]


def test_nothing_warns_under_the_new_names():
    code = "import flash_xlstm.nn.block_stack, flash_xlstm.nn.xlstm_7b; from flash_xlstm.nn import *"
    subprocess.run([sys.executable, "-W", "error::DeprecationWarning:flash_xlstm", "-c", code], check=True)


@pytest.mark.parametrize(
    ("module", "name", "kind"),
    [("blocks.stack", "mLSTMBlock", block_stack.mLSTMBlock), ("mlstm", "mLSTMLayer", xlstm_7b.mLSTMLayer)],
)
def test_pickles_with_old_names_load(fresh, module, name, kind):
    with pytest.warns(DeprecationWarning):
        assert pickle.loads(f"cflash_xlstm.nn.{module}\n{name}\n.".encode()) is kind
