from __future__ import annotations

import dataclasses
import json

import pytest

from flash_xlstm.cli import main, tasks
from flash_xlstm.training.tasks import results
from flash_xlstm.training.tasks.data import TASKS


@pytest.fixture
def run(tmp_path, monkeypatch):
    """``run(*options)``: the exit code of the command on short sequences, and its results."""
    short = {name: dataclasses.replace(recipe, test_rows=128, batch_size=32) for name, recipe in tasks.SMALL.items()}
    for name in short:
        if name != "mqar":
            short[name] = dataclasses.replace(short[name], train_lengths=(8, 16), test_lengths=(16, 32))
    monkeypatch.setattr(tasks, "SMALL", short)

    def call(*options):
        folder = tmp_path / "out"
        code = main(["tasks", "--small", "--out", str(folder), "--device", "cpu", *options])
        return code, folder

    return call


@pytest.mark.slow
def test_the_slstm_learns_parity_and_the_mlstm_does_not(run, capsys):
    code, folder = run("--models", "0:1", "1:0", "--steps", "400")
    assert code == 0
    results = json.loads((folder / "tasks.json").read_text())
    slstm, mlstm = results["results"]
    assert (slstm["model"], mlstm["model"]) == ("0:1", "1:0")
    assert min(slstm["accuracy"].values()) >= 0.99
    assert mlstm["accuracy"]["32"] < 0.7
    assert results["environment"]["flash_xlstm"]["commit"] and slstm["most_steps"] == 400
    assert slstm["stopped"] == "solved" and slstm["steps"] < 400
    assert mlstm["stopped"] == "steps" and mlstm["steps"] == 400
    assert (folder / "tasks.png").read_bytes().startswith(b"\x89PNG")
    table = (folder / "tasks.txt").read_text()
    assert "parity: accuracy in percent, chance 50; trained on up to 16 tokens" in table
    assert f"xLSTM[0:1]  {100 * slstm['accuracy']['16']:>7.1f}" in table
    captured = capsys.readouterr()
    assert table.strip() in captured.out and "parity xLSTM[1:0]" in captured.err


def test_every_task_and_model_runs(run):
    code, folder = run("--tasks", *tasks.SMALL, "--steps", "2")
    assert code == 0
    rows = json.loads((folder / "tasks.json").read_text())["results"]
    assert [(row["task"], row["model"]) for row in rows] == [(t, m) for t in tasks.SMALL for m in tasks.MODELS]
    assert all(0 <= accuracy <= 1 for row in rows for accuracy in row["accuracy"].values())


def test_a_time_limit_is_kept(run):
    code, folder = run("--models", "1:0", "0:1", "--steps", "1000000", "--seconds", "4")
    results = json.loads((folder / "tasks.json").read_text())
    assert code == 0 and results["seconds"] < 20
    for row in results["results"]:
        assert row["stopped"] == "seconds" and 0 < row["steps"] < 1000000 and set(row["accuracy"]) == {"16", "32"}


def test_results_are_written_after_each_model(run, tmp_path, monkeypatch):
    build = results.build

    def interrupted_at_the_second(recipe, kind):
        if kind == "0:1":
            raise KeyboardInterrupt
        return build(recipe, kind)

    monkeypatch.setattr(results, "build", interrupted_at_the_second)
    assert run("--models", "1:0", "0:1", "--steps", "1")[0] == 130
    assert [row["model"] for row in json.loads((tmp_path / "out" / "tasks.json").read_text())["results"]] == ["1:0"]


def test_divergence_is_told(run, error_line, monkeypatch):
    recipe = dataclasses.replace(tasks.SMALL["parity"], learning_rate=1e30)
    monkeypatch.setitem(tasks.SMALL, "parity", recipe)
    assert run("--models", "0:1", "--steps", "5")[0] == 2
    assert "training of parity xLSTM[0:1] diverged at step" in error_line()


def test_the_command_line_knows_every_task(run):
    assert set(tasks.FULL) == set(tasks.SMALL) == set(TASKS)
    with pytest.raises(SystemExit):
        run("--tasks", "nonsense")
