"""The script that runs transformers' suites: it does not pass where nothing ran. Its FOLDER is made here."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("transformers")
SCRIPT = Path(__file__).parents[1] / "transformers_suites.py"
BROKEN = "raise RuntimeError('this suite is broken')\n"
COMMON = """import unittest
class ModelTesterMixin:
    def test_ours(self): pass
class GenerationTesterMixin: pass
class PipelineTesterMixin: pass
class ConfigTester:
    def __init__(self, *args, **kwargs): pass
    def run_common_tests(self): pass
"""
STOCK = "import unittest\nclass xLSTMModelTest(unittest.TestCase):\n    def test_stock(self): pass\n"


@pytest.fixture
def suites(tmp_path):
    """Runs the script on a folder with these texts. Returns the exit code and what it printed."""

    def call(common, stock, *options):
        folder = tmp_path / "tests"
        (folder / "models" / "xlstm").mkdir(parents=True, exist_ok=True)
        (folder / "generation").mkdir(exist_ok=True)
        for name in (
            "test_modeling_common",
            "test_pipeline_mixin",
            "test_configuration_common",
            "generation/test_utils",
        ):
            (folder / f"{name}.py").write_text(common)
        if stock is not None:
            (folder / "models" / "xlstm" / "test_modeling_xlstm.py").write_text(stock)
        done = subprocess.run([sys.executable, SCRIPT, folder, *options], capture_output=True, text=True)
        return done.returncode, done.stdout + done.stderr

    return call


def test_both_sides_ran(suites, tmp_path):
    code, text = suites(COMMON, STOCK, "--results", tmp_path / "results.txt")
    assert code == 0, text
    assert "ours: 2 passed\nstock: 1 passed\n" in (tmp_path / "results.txt").read_text()


def test_a_suite_that_cannot_be_collected_is_an_error(suites):
    pytest.importorskip("xdist")  # with it pytest ends as if tests had failed
    code, text = suites(BROKEN, STOCK, "-n", "1")
    assert code == 1 and "this suite is broken" in text and "transformers_suites.py: pytest ended with" in text
    assert "ours:" not in text


def test_a_side_without_tests_is_an_error(suites):
    code, text = suites(COMMON, "\n")
    assert code == 1 and "test_modeling_xlstm.py: pytest ended with 5 after 0 tests" in text and "ours:" not in text


def test_wrong_arguments(suites):
    code, text = suites(COMMON, None)
    assert code == 2 and "there is no" in text and "test_modeling_xlstm.py" in text
    code, text = suites(COMMON, STOCK, "--results")
    assert code == 2 and "argument --results: expected one argument" in text
