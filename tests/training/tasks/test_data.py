from __future__ import annotations

import pytest
import torch

from flash_xlstm.training.tasks.data import IGNORED, TASKS, recall


def _sample(name, length, rows=200, seed=0):
    task = TASKS[name] if isinstance(name, str) else name
    return task.sample(length, rows, torch.Generator().manual_seed(seed))


def test_parity_counts_ones():
    for bits, targets in zip(*_sample("parity", 9), strict=True):
        assert targets.tolist() == [sum(bits[: t + 1].tolist()) % 2 for t in range(9)]


def test_even_pairs_is_whether_the_ends_differ():
    bits, targets = _sample("even-pairs", 9)
    assert torch.equal(targets, (bits != bits[:, :1]).long())


def test_cycle_navigation_walks():
    for moves, targets in zip(*_sample("cycle-navigation", 12), strict=True):
        place = 0
        for move, target in zip(moves.tolist(), targets.tolist(), strict=True):
            place = (place + {0: 0, 1: 1, 2: -1}[move]) % 5
            assert target == place


def test_modular_arithmetic_is_pythons():
    tokens, targets = _sample("modular-arithmetic", 14)
    assert tokens.shape == (200, 13) and (targets[:, 1::2] == IGNORED).all()
    for row, answers in zip(tokens.tolist(), targets.tolist(), strict=True):
        text = "".join("01234+-*"[token] for token in row)
        for end in range(0, 13, 2):
            assert answers[end] == eval(text[: end + 1]) % 5, text


@pytest.mark.parametrize("length", [1, 8, 31])
def test_recall_asks_for_every_key_once(length):
    tokens, targets = _sample(recall(64), length, rows=20)
    assert tokens.shape == targets.shape == (20, 4 * length)
    for row, answers in zip(tokens.tolist(), targets.tolist(), strict=True):
        values = dict(zip(row[0 : 2 * length : 2], row[1 : 2 * length : 2], strict=True))
        assert len(values) == length and all(0 < k < 32 <= v < 64 for k, v in values.items())
        asked = {token: answer for token, answer in zip(row, answers, strict=True) if answer != IGNORED}
        assert asked == values
        rest = [token for token, answer in zip(row[2 * length :], answers[2 * length :], strict=True) if answer < 0]
        assert rest == [0] * length


@pytest.mark.parametrize("name", TASKS)
def test_tokens_fit_the_vocabulary_and_chance_is_chance(name):
    task = TASKS[name]
    tokens, targets = _sample(name, 40, rows=2000)
    asked = targets[:, -1] if task.last_only else targets[targets != IGNORED]
    asked = asked[asked != IGNORED]
    assert 0 <= tokens.min() and tokens.max() < task.vocab_size and asked.max() < task.vocab_size
    best = asked.bincount().max().item() / len(asked)
    assert best == pytest.approx(task.chance, abs=0.05)


def test_the_seed_decides():
    for name in TASKS:
        first, again, other = (_sample(name, 11, rows=5, seed=seed)[0] for seed in (0, 0, 1))
        assert torch.equal(first, again) and not torch.equal(first, other)
