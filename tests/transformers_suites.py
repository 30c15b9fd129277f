"""Runs transformers' own common test suites on this package's classes, beside stock's own result.

    python tests/transformers_suites.py FOLDER [--slow] [--results FILE] [arguments of pytest ...]

FOLDER is the folder ``tests`` of a checkout of the installed version of transformers. Nothing is fetched. ``--slow``
adds the tests that transformers runs nightly. ``--results`` writes what failed, and why. Ends with 1 where a test of
ours fails without an explanation below, or a side ran no test. Needs pytest and parameterized.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import unittest
from collections import Counter
from pathlib import Path

_FOLDER = "FLASH_XLSTM_TRANSFORMERS_TESTS"

# Why a test of ours fails, by its name. Each is a line.
EXPLAINED: dict[str, str] = {}


class _Outcomes:
    """A plugin of pytest: how each test ended, and what could not be collected."""

    def __init__(self) -> None:
        self.of: dict[str, str] = {}
        self.errors: list[str] = []

    def pytest_collectreport(self, report) -> None:
        if report.failed:
            self.errors.append(report.longreprtext)

    def pytest_runtest_logreport(self, report) -> None:
        name = report.nodeid.rpartition("::")[2]
        if report.failed or (report.when == "call" and name not in self.of):
            self.of[name] = report.outcome
        elif report.skipped:
            self.of.setdefault(name, "skipped")


def _run(file: Path | str, arguments: list[str]) -> dict[str, str]:
    """How each test in a file ended. It has a process of its own: ours registers its classes with transformers."""
    with tempfile.TemporaryDirectory() as folder:
        found = Path(folder) / "outcomes.json"
        code = subprocess.run([sys.executable, __file__, "--only", file, found, *arguments]).returncode
        if code:
            sys.exit(f"{file}: no results, its process ended with {code}")
        return json.loads(found.read_text())


def _only(file: str, found: str, arguments: list[str]) -> None:
    import pytest

    outcomes = _Outcomes()
    # transformers' tests have their own settings. This repository's would turn their warnings into errors.
    options = ["-c", os.devnull, "--noconftest", "-p", "no:cacheprovider", "-q"]
    status = pytest.main([*options, file, *arguments], plugins=[outcomes])
    # Neither passed nor failed: it did not run. Under pytest-xdist an error of collection is a failure, too.
    if status not in (0, 1) or outcomes.errors or not outcomes.of:
        reasons = "".join(f"\n{error}" for error in outcomes.errors)
        sys.exit(f"{file}: pytest ended with {int(status)} after {len(outcomes.of)} tests{reasons}")
    Path(found).write_text(json.dumps(outcomes.of))


def _table(ours: dict[str, str], stock: dict[str, str]) -> tuple[str, int]:
    """The results, and how many failures of ours have no explanation."""
    import transformers

    count = lambda outcomes: ", ".join(f"{n} {what}" for what, n in sorted(Counter(outcomes.values()).items()))  # noqa: E731
    lines = [f"transformers {transformers.__version__}", f"ours: {count(ours)}", f"stock: {count(stock)}", ""]
    failed = sorted(name for name, what in ours.items() if what == "failed")
    for name in failed:
        lines.append(f"{name} (stock: {stock.get(name, 'has none')}): {EXPLAINED.get(name, 'NOT EXPLAINED')}")
    worse = sorted(name for name, what in stock.items() if what == "failed" and ours.get(name) == "passed")
    lines += ["", "passed by ours, failed by stock: " + (", ".join(worse) or "none")]
    skipped = sorted(name for name, what in stock.items() if what == "skipped" and ours.get(name) == "passed")
    lines.append("passed by ours, skipped for stock: " + (", ".join(skipped) or "none"))
    return "\n".join(lines) + "\n", sum(name not in EXPLAINED for name in failed)


if __name__ == "__main__":
    arguments = sys.argv[1:]
    if arguments[:1] == ["--only"]:
        _only(*arguments[1:3], arguments[3:])
        sys.exit()
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("--slow", action="store_true")
    parser.add_argument("--results", type=Path, metavar="FILE")
    args, arguments = parser.parse_known_args()
    folder = args.folder.resolve()
    stock_file = folder / "models" / "xlstm" / "test_modeling_xlstm.py"
    for file in (folder / "test_modeling_common.py", stock_file):
        if not file.is_file():
            parser.error(f"folder must be `tests` of a checkout of transformers; there is no {file}")
    os.environ[_FOLDER] = str(folder)
    os.environ["HF_HUB_OFFLINE"] = "1"
    if args.slow:
        os.environ["RUN_SLOW"] = "1"
    ours = _run(__file__, arguments)
    stock = _run(stock_file, [*arguments, "-k", "xLSTMModelTest"])
    text, unexplained = _table(ours, stock)
    print(text, end="")
    if args.results is not None:
        args.results.write_text(text)
    sys.exit(1 if unexplained else 0)

FOLDER = Path(os.environ[_FOLDER])
sys.path.insert(0, str(FOLDER.parent))
sys.modules.pop("tests", None)

import importlib  # noqa: E402

import torch  # noqa: E402

from flash_xlstm.models import register, xLSTMCache, xLSTMConfig, xLSTMForCausalLM, xLSTMModel  # noqa: E402

_theirs = lambda name: importlib.import_module(f"{FOLDER.name}.{name}")  # noqa: E731
common, generation = _theirs("test_modeling_common"), _theirs("generation.test_utils")
pipelines, configuration = _theirs("test_pipeline_mixin"), _theirs("test_configuration_common")

register()  # the Auto classes too


class _Tester:
    """The model and the inputs that the suites ask for."""

    batch_size, seq_length, vocab_size = 13, 7, 99
    hidden_size, num_hidden_layers, num_heads = 128, 2, 2
    is_training = True
    pad_token_id = bos_token_id = eos_token_id = vocab_size - 1

    def get_config(self) -> xLSTMConfig:
        return xLSTMConfig(
            vocab_size=self.vocab_size,
            hidden_size=self.hidden_size,
            num_hidden_layers=self.num_hidden_layers,
            num_heads=self.num_heads,
            pad_token_id=self.pad_token_id,
            bos_token_id=self.bos_token_id,
            eos_token_id=self.eos_token_id,
        )

    def prepare_config_and_inputs_for_common(self) -> tuple[xLSTMConfig, dict[str, torch.Tensor]]:
        return self.get_config(), {"input_ids": common.ids_tensor([self.batch_size, self.seq_length], self.vocab_size)}


class xLSTMTest(
    common.ModelTesterMixin, generation.GenerationTesterMixin, pipelines.PipelineTesterMixin, unittest.TestCase
):
    all_model_classes = (xLSTMModel, xLSTMForCausalLM)
    all_generative_model_classes = (xLSTMForCausalLM,)
    pipeline_model_mapping = {"feature-extraction": xLSTMModel, "text-generation": xLSTMForCausalLM}  # noqa: RUF012
    has_attentions = False

    def setUp(self) -> None:
        self.model_tester = _Tester()
        self.config_tester = configuration.ConfigTester(
            self, config_class=xLSTMConfig, common_properties=["hidden_size", "num_hidden_layers"]
        )

    def test_config(self) -> None:
        self.config_tester.run_common_tests()

    # The suites support the layout of transformers' own caches only.

    def _check_past_key_values_for_generate(self, batch_size, past_key_values, seq_length, config) -> None:
        self.assertIsInstance(past_key_values, xLSTMCache)
        past_key_values.check(config, batch_size)
        self.assertEqual(past_key_values.get_seq_length(), seq_length)

    _check_cache_for_generate = _check_past_key_values_for_generate

    def _check_caches_are_equal(self, cache1: xLSTMCache, cache2: xLSTMCache) -> None:
        self.assertEqual(cache1.get_seq_length(), cache2.get_seq_length())
        for layer, state in cache1.rnn_state.items():
            for a, b in zip(state, cache2.rnn_state[layer], strict=True):
                torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)
