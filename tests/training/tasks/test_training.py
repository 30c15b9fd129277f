from __future__ import annotations

import dataclasses

import pytest
import torch

from flash_xlstm.training.tasks.recipes import SMALL, build
from flash_xlstm.training.tasks.training import train


@pytest.mark.cuda
@pytest.mark.parametrize("name", SMALL)
def test_cuda_graphs_train_as_eager_steps_do(name):
    losses = {}
    for graphs in (False, True):
        recipe = dataclasses.replace(SMALL[name], batch_size=8)
        torch.manual_seed(0)
        model = build(recipe, "1:1").to("cuda")
        generator = torch.Generator("cuda").manual_seed(0)
        trained = train(model, recipe, 30, generator, torch.float32, name, cuda_graphs=graphs)
        assert trained.cuda_graphs == graphs and trained.steps == 30
        losses[graphs] = trained.loss
    assert losses[True] == pytest.approx(losses[False], rel=1e-2)
