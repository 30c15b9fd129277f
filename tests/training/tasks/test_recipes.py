from __future__ import annotations

import pytest
import torch

from flash_xlstm.training.tasks.recipes import FULL, MODELS, SMALL, build


@pytest.mark.parametrize("recipes", [FULL, SMALL], ids=["full", "small"])
def test_recipes_are_whole(recipes):
    parity = recipes["parity"]
    assert set(parity.test_lengths) >= {n * parity.longest for n in range(2, 7)}
    assert 64 in FULL["mqar"].test_lengths
    for recipe in recipes.values():
        assert list(recipe.train_lengths) == sorted(recipe.train_lengths)
        assert recipe.open_lengths(0.0) == recipe.train_lengths[:1]
        assert recipe.open_lengths(0.5) == recipe.open_lengths(0.999) == recipe.train_lengths
        for kind, layout in MODELS.items():
            model = build(recipe, kind)
            assert model.config.block_map == layout
            assert model(torch.zeros(1, 3, dtype=torch.int64)).shape == (1, 3, recipe.task.vocab_size)
