from __future__ import annotations

import dataclasses
import json

import pytest
import torch

from flash_xlstm.cli import main, tasks


@pytest.fixture
def run(tmp_path, monkeypatch):
    """``run(*options)``: the exit code of the command on short sequences, and its results."""
    short = {name: dataclasses.replace(recipe, test_rows=128, batch_size=32) for name, recipe in tasks.SMALL.items()}
    for name in short:
        if name != "mqar":
            short[name] = dataclasses.replace(short[name], longest=16, test_lengths=(16, 32))
    monkeypatch.setattr(tasks, "SMALL", short)

    def call(*options):
        folder = tmp_path / "out"
        code = main(["tasks", "--small", "--out", str(folder), "--device", "cpu", *options])
        return code, folder

    return call


def test_the_slstm_learns_parity_and_the_mlstm_does_not(run, capsys):
    code, folder = run("--models", "0:1", "1:0", "--steps", "400")
    assert code == 0
    results = json.loads((folder / "tasks.json").read_text())
    slstm, mlstm = results["results"]
    assert (slstm["model"], mlstm["model"]) == ("0:1", "1:0")
    assert min(slstm["accuracy"].values()) >= 0.99
    assert mlstm["accuracy"]["32"] < 0.7
    assert results["environment"]["flash_xlstm"]["commit"] and slstm["steps"] == 400
    assert (folder / "tasks.png").read_bytes().startswith(b"\x89PNG")
    table = (folder / "tasks.txt").read_text()
    assert "parity: accuracy in percent, chance 50; trained on 1 to 16 tokens" in table
    assert f"xLSTM[0:1]  {100 * slstm['accuracy']['16']:>7.1f}" in table
    captured = capsys.readouterr()
    assert table.strip() in captured.out and "parity xLSTM[1:0]" in captured.err


def test_every_task_and_model_runs(run):
    code, folder = run("--tasks", *tasks.SMALL, "--steps", "2")
    assert code == 0
    rows = json.loads((folder / "tasks.json").read_text())["results"]
    assert [(row["task"], row["model"]) for row in rows] == [(t, m) for t in tasks.SMALL for m in tasks.MODELS]
    assert all(0 <= accuracy <= 1 for row in rows for accuracy in row["accuracy"].values())


@pytest.mark.parametrize("recipes", [tasks.FULL, tasks.SMALL], ids=["full", "small"])
def test_recipes_are_whole(recipes):
    parity = recipes["parity"]
    assert set(parity.test_lengths) >= {n * parity.longest for n in range(2, 7)}
    assert 64 in tasks.FULL["mqar"].test_lengths
    for recipe in recipes.values():
        for kind, layout in tasks.MODELS.items():
            model = tasks.build(recipe, kind)
            assert model.config.block_map == layout
            assert model(torch.zeros(1, 3, dtype=torch.int64)).shape == (1, 3, recipe.task.vocab_size)


def test_divergence_is_told(run, error_line, monkeypatch):
    recipe = dataclasses.replace(tasks.SMALL["parity"], learning_rate=1e30)
    monkeypatch.setitem(tasks.SMALL, "parity", recipe)
    assert run("--models", "0:1", "--steps", "5")[0] == 2
    assert "training of parity xLSTM[0:1] diverged at step" in error_line()


def test_the_command_line_knows_every_task(run):
    assert set(tasks.FULL) == set(tasks.SMALL) == set(tasks.TASKS)
    with pytest.raises(SystemExit):
        run("--tasks", "nonsense")
