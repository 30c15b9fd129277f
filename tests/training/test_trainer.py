"""Training without the command line."""

from __future__ import annotations

import doctest
import errno
import fcntl
import subprocess
import sys

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from flash_xlstm import training
from flash_xlstm.models import xLSTMConfig, xLSTMForCausalLM
from flash_xlstm.training import Progress, RunOptions, TrainingError, TrainSettings


@pytest.fixture
def settings(text):
    sizes = {"hidden_size": 32, "layers": 1, "heads": 1, "sequence_length": 16, "batch_size": 2}
    return {"data": text, **sizes, "warmup": 2, "steps": 6}


@pytest.fixture
def options(tmp_path):
    return {"out": tmp_path / "run", "device": "cpu", "log_every": 2}


class Told(Progress):
    def __init__(self):
        self.events = []

    def started(self, trainer):
        assert trainer.out.is_dir()
        self.events.append(("started", trainer.step))

    def evaluated(self, row):
        self.events.append(("evaluated", row["step"], "held_out_bits_per_byte" in row))

    def __enter__(self):
        self.events.append("enter")

    def stepped(self, row):
        self.events.append(row and row["step"])

    def __exit__(self, *error):
        self.events.append(("exit", error[0]))


def test_the_example(text, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = doctest.testmod(training, optionflags=doctest.NORMALIZE_WHITESPACE)
    assert result.attempted > 6 and result.failed == 0


def test_a_run_tells_its_progress_and_prints_nothing(settings, options, capfd):
    told, trainer = Told(), training.start(settings, options)
    result = trainer.run(told)
    assert told.events == [
        ("started", 0), ("evaluated", 0, True), "enter", None, 2, None, 4, None, 6, ("exit", None),
    ]  # fmt: skip
    assert result == training.RunResult(options["out"] / "checkpoint-6", "steps")
    assert [row["step"] for row in trainer.history] == [0, 2, 4, 6]
    assert sorted(p.name for p in options["out"].iterdir()) == ["checkpoint-6", "loss.png", "metrics.csv"]
    assert capfd.readouterr().out == ""


def test_a_resumed_run_tells_so_and_ends_with_the_same_weights(settings, options, tmp_path):
    whole = training.start(settings, {**options, "out": tmp_path / "whole"}).run()
    first = training.start(settings, {**options, "time_limit": 1e-9}).run()
    assert (first.ended, first.folder.name) == ("time limit", "checkpoint-0")

    class Stop(Told):
        def stepped(self, row):
            super().stepped(row)
            trainer.options = RunOptions(out=str(options["out"]), save_every=100)
            trainer._signals.received = True

    trainer = training.resume({}, options)
    assert trainer.run(Stop()).ended == "signal" and trainer.step == 1
    told = Told()
    last = training.resume({"data": settings["data"], "steps": 6}, options)
    assert last.run(told).ended == "steps"
    assert told.events[:2] == [("started", 1), "enter"]
    a, b = (load_file(folder / "model.safetensors") for folder in (whole.folder, options["out"] / "checkpoint-6"))
    assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_an_error_leaves_the_steps(settings, options, monkeypatch):
    told, trainer = Told(), training.start(settings, options)
    monkeypatch.setattr(trainer, "_train_step", lambda: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        trainer.run(told)
    assert told.events[-2:] == ["enter", ("exit", ZeroDivisionError)]


def test_a_trainer_of_your_own_corpus_and_model(options):
    tokens = torch.arange(400) % 7
    corpus = training.Corpus(tokens[:300], tokens[300:], bytes(range(100)), 1.0, "mine")
    torch.manual_seed(0)
    model = xLSTMForCausalLM(xLSTMConfig(vocab_size=7, hidden_size=32, num_hidden_layers=1, num_heads=1))
    own = TrainSettings(steps=20, warmup=2, sequence_length=16, batch_size=4)
    trainer = training.Trainer(own, RunOptions(**options), corpus, None, model)
    assert trainer.settings.dtype == "float32"
    assert trainer.run().ended == "steps"
    assert trainer.history[-1]["loss"] < 1.8 < trainer.history[1]["loss"]


def test_a_run_does_not_replace_another(settings, options):
    trainer = training.start(settings, options)
    training.start(settings, options).run()
    message = "checkpoint-6 exists already; go on from it with `resume`, or choose another `out`"
    with pytest.raises(TrainingError, match=message):
        training.start(settings, options)
    with pytest.raises(TrainingError, match=message):
        trainer.run()


def test_one_run_at_a_time_writes_a_folder(settings, options):
    class Other(Progress):
        def __enter__(self):
            with pytest.raises(TrainingError, match=r"cannot write to .*run: another process is training there"):
                second.run()

    second = training.start({**settings, "seed": 1}, options)
    training.start(settings, options).run(Other())
    rows = (options["out"] / "metrics.csv").read_text()
    with pytest.raises(TrainingError, match="checkpoint-6 exists already"):  # the folder is free again
        second.run()
    assert (options["out"] / "metrics.csv").read_text() == rows


def test_a_resumed_run_whose_checkpoint_another_has_replaced(settings, options):
    training.start(settings, {**options, "time_limit": 1e-9}).run()
    late, early = (training.resume({}, options) for _ in range(2))
    early.run()
    with pytest.raises(TrainingError, match=r"cannot go on at step 0: another process has written .*-6 since"):
        late.run()


def test_file_systems_without_locks_are_used_without(settings, options, monkeypatch):
    def flock(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", flock)
    assert training.start(settings, options).run().ended == "steps"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"steps": 0}, r"steps is 0; it must be a whole number from 1 to 2\^63 - 1"),
        ({"steps": True}, "steps is True; it must be a whole number"),
        ({"steps": np.int64(3)}, "steps is .*; it must be a whole number"),
        ({"learning_rate": float("nan")}, "learning_rate is nan; it must be a number greater than 0"),
        ({"learning_rate": 10**400}, "learning_rate is 1000.*; it must be a number greater than 0"),
        ({"final_learning_rate": 2}, "final_learning_rate is 2.0; it must be a number from 0 to 1"),
        ({"data": 3}, "data is 3; it must be a path"),
        ({"dtype": "float16"}, "dtype is 'float16'; it must be one of: auto, float32, bfloat16"),
        ({"compile": 1}, "compile is 1; it must be True or False"),
        ({"config": "x.json"}, "`config` and `hidden_size` exclude each other"),
        ({"data": "/nowhere"}, "no data: /nowhere does not exist"),
        ({"sequence_length": 10**6}, "too little data: .*; `sequence_length` 1000000 needs at least"),
        ({"heads": 3}, "num_heads"),
    ],
)
@pytest.mark.filterwarnings("ignore")
def test_wrong_settings(settings, options, change, message):
    with pytest.raises(ValueError, match=message):
        training.start({**settings, **change}, options)
    assert not options["out"].exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"device": "abacus"}, "`device` abacus: "),
        ({"device": None}, "device is None; it must be the name of a device"),
        ({"save_every": 0}, "save_every is 0; it must be a whole number from 1"),
        ({"time_limit": 0}, "time_limit is 0.0; it must be a number greater than 0"),
        ({"out": None}, "out is None; it must be a path"),
    ],
)
def test_wrong_options(settings, options, change, message):
    for begin in (training.start, training.resume):
        with pytest.raises(ValueError, match=message):
            begin(settings, {**options, **change})


def test_unknown_names(settings, options):
    for begin in (training.start, training.resume):
        with pytest.raises(TypeError, match="nonsense"):
            begin({**settings, "nonsense": 1}, options)
        with pytest.raises(TypeError, match="nonsense"):
            begin(settings, {**options, "nonsense": 1})


def test_values_take_one_form(text):
    settings = TrainSettings(data=text, clip=1, learning_rate=1)
    assert settings == TrainSettings(data=str(text), clip=1.0, learning_rate=1.0)
    assert type(settings.data) is str and type(settings.clip) is type(settings.learning_rate) is float


def test_paths_are_found_from_another_directory(settings, options, text, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    training.start({**settings, "data": text.name}, options).run()
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert training.resume({}, options).step == 6


def test_only_matrices_decay(settings, options):
    trainer = training.start({**settings, "weight_decay": 0.25}, options)
    decayed, rest = trainer.optimizer.param_groups
    assert decayed["weight_decay"] == 0.25 and rest["weight_decay"] == 0
    assert {p.dim() for p in decayed["params"]} == {2} and {p.dim() for p in rest["params"]} == {1}
    assert len(decayed["params"]) + len(rest["params"]) == len(list(trainer.model.parameters()))


def test_learning_rate_warms_up_and_follows_a_cosine():
    settings = TrainSettings(steps=110, warmup=10, learning_rate=2.0, final_learning_rate=0.1)
    rates = [training.learning_rate(step, settings) for step in (0, 4, 9)]
    assert rates == [0.2, 1.0, 2.0]
    assert training.learning_rate(60, settings) == pytest.approx(2.0 * 0.55)
    assert training.learning_rate(110, settings) == pytest.approx(0.2)


def test_it_needs_no_command_line():
    """The command line is not imported, and transformers' logging is unchanged."""
    code = """
import sys
import transformers.utils.logging as logging
before = logging.get_verbosity(), logging.is_progress_bar_enabled()
from flash_xlstm.training import *
from flash_xlstm.training import checkpoint, setup
assert (logging.get_verbosity(), logging.is_progress_bar_enabled()) == before
assert not [name for name in sys.modules if name.startswith("flash_xlstm.cli")]
"""
    subprocess.run([sys.executable, "-c", code], check=True)
