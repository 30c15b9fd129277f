from __future__ import annotations

import sys

import pytest

from flash_xlstm import training
from flash_xlstm.training import TrainingError


@pytest.fixture
def settings(text):
    sizes = {"hidden_size": 32, "layers": 1, "heads": 1, "sequence_length": 16, "batch_size": 2}
    return {"data": text, **sizes, "warmup": 2, "steps": 6}


@pytest.fixture
def options(tmp_path):
    return {"out": tmp_path / "run", "device": "cpu", "log_every": 1, "tensorboard": True}


def _scalars(folder):
    """``{name: {step: value}}`` of a folder's event files."""
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    events = accumulator.EventAccumulator(str(folder))
    events.Reload()
    return {name: {event.step: event.value for event in events.Scalars(name)} for name in events.Tags()["scalars"]}


def test_tensorboard_has_the_history(settings, options):
    pytest.importorskip("tensorboard")
    trainer = training.start(settings, options)
    trainer.run()
    scalars = _scalars(options["out"] / "tensorboard")
    assert {
        "loss",
        "held_out_bits_per_byte",
        "learning_rate",
        "tokens_per_s",
    } <= scalars.keys() and "step" not in scalars
    for row in trainer.history:
        for name, value in row.items():
            if name != "step":
                assert scalars[name][row["step"]] == pytest.approx(value, rel=1e-6)


@pytest.mark.slow
def test_steps_that_were_not_saved_are_hidden(settings, options, monkeypatch):
    pytest.importorskip("tensorboard")
    trainer = training.start(settings, {**options, "save_every": 2})

    class Killed(BaseException):
        pass

    class Kill(training.Progress):
        def stepped(self, row):
            if trainer.step == 4:
                raise Killed

    with pytest.raises(Killed):
        trainer.run(Kill())
    assert max(_scalars(options["out"] / "tensorboard")["loss"]) == 4
    last = training.resume({}, options)
    assert last.step == 2
    last.run()
    found = _scalars(options["out"] / "tensorboard")["loss"]
    assert sorted(found) == [1, 2, 3, 4, 5, 6]
    for row in last.history[1:]:
        assert found[row["step"]] == pytest.approx(row["loss"], rel=1e-6)


def test_without_the_package(settings, options, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(
        TrainingError, match=r'`tensorboard` needs the package .* pip install "flash-xlstm\[tensorboard\]"'
    ):
        training.start(settings, options)
    assert not options["out"].exists()
    training.start(settings, {**options, "tensorboard": False}).run()
    assert not (options["out"] / "tensorboard").exists()
