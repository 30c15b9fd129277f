"""Random sequences of the tasks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

IGNORED = -100  # a position without a target
_CYCLE = 5
_MODULUS = 5
_PLUS, _MINUS, _TIMES = range(_MODULUS, _MODULUS + 3)

Sample = Callable[[int, int, torch.Generator], tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Task:
    """A task: what sequences look like, and what their answers are.

    Attributes:
        title: its name in tables and plots.
        vocab_size: number of tokens, answers among them.
        chance: accuracy of the best constant answer.
        sample: ``sample(length, rows, generator)`` returns tokens and targets, both (rows, seq) int64 on the
            generator's device. A target is the answer after that token, or IGNORED.
        last_only: whether accuracy counts the last token's answer only, which depends on the whole sequence.
        unit: the unit of `length`.
    """

    title: str
    vocab_size: int
    chance: float
    sample: Sample
    last_only: bool = True
    unit: str = "tokens"


def parity(length: int, rows: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Bits; the answer is whether the number of ones so far is odd."""
    bits = torch.randint(2, (rows, length), generator=generator, device=generator.device)
    return bits, bits.cumsum(1) % 2


def even_pairs(length: int, rows: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Bits; the answer is whether the number of 01 and 10 among neighbours so far is odd."""
    bits = torch.randint(2, (rows, length), generator=generator, device=generator.device)
    changes = torch.zeros_like(bits)
    changes[:, 1:] = bits[:, 1:] != bits[:, :-1]
    return bits, changes.cumsum(1) % 2


def cycle_navigation(length: int, rows: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Moves on a cycle of 5 places: 0 stays, 1 steps forward, 2 steps back. The answer is the current place."""
    moves = torch.randint(3, (rows, length), generator=generator, device=generator.device)
    steps = torch.tensor([0, 1, -1], device=moves.device)[moves]
    return moves, steps.cumsum(1) % _CYCLE


def modular_arithmetic(length: int, rows: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Digits 0 to 4 with +, - and * between them, * first. The answer after a digit is the value so far, modulo 5.

    The sequence has the largest odd number of tokens that `length` allows.
    """
    terms = (length + 1) // 2
    device = generator.device
    tokens = torch.empty(rows, 2 * terms - 1, dtype=torch.int64, device=device)
    tokens[:, ::2] = torch.randint(_MODULUS, (rows, terms), generator=generator, device=device)
    tokens[:, 1::2] = torch.randint(_PLUS, _TIMES + 1, (rows, terms - 1), generator=generator, device=device)
    targets = torch.full_like(tokens, IGNORED)
    whole = torch.zeros_like(tokens[:, 0])  # sum of the complete products
    product = tokens[:, 0].clone()  # the open product, with its sign
    for position in range(0, 2 * terms - 1, 2):
        if position:
            operator, digit = tokens[:, position - 1], tokens[:, position]
            times = operator == _TIMES
            whole = torch.where(times, whole, whole + product)
            product = torch.where(times, product * digit, torch.where(operator == _PLUS, digit, -digit)) % _MODULUS
        targets[:, position] = (whole + product) % _MODULUS
    return tokens, targets


@dataclass(frozen=True)
class Recall:
    """Multi-query associative recall (arXiv 2312.04927). A sequence lists pairs of a key and a value, then repeats the
    keys in another order among blanks. The answer at a repeated key is its value. `length` is the number of pairs, a
    quarter of the tokens.

    Token 0 is the blank, the lower half of the others are keys, the upper half values.
    """

    vocab_size: int

    def __call__(self, length: int, rows: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        half, device = self.vocab_size // 2, generator.device
        distinct = lambda among: torch.rand(rows, among, generator=generator, device=device).topk(length).indices  # noqa: E731
        keys = distinct(half - 1) + 1
        values = torch.randint(half, self.vocab_size, (rows, length), generator=generator, device=device)
        tokens = torch.zeros(rows, 4 * length, dtype=torch.int64, device=device)
        tokens[:, 0 : 2 * length : 2], tokens[:, 1 : 2 * length : 2] = keys, values
        targets = torch.full_like(tokens, IGNORED)
        order, places = distinct(length), distinct(2 * length) + 2 * length
        tokens.scatter_(1, places, keys.gather(1, order))
        targets.scatter_(1, places, values.gather(1, order))
        return tokens, targets


def recall(vocab_size: int) -> Task:
    """The recall task with a vocabulary of this size."""
    title = "multi-query associative recall"
    return Task(title, vocab_size, 2 / vocab_size, Recall(vocab_size), last_only=False, unit="pairs")


TASKS: dict[str, Task] = {
    "parity": Task("parity", 2, 1 / 2, parity),
    "cycle-navigation": Task("cycle navigation", _CYCLE, 1 / _CYCLE, cycle_navigation),
    # Accuracy of the constant answer 0 is near chance, though a factor of 0 makes 0 likelier than the others.
    "modular-arithmetic": Task("modular arithmetic without brackets", 8, 1 / _MODULUS, modular_arithmetic),
    "even-pairs": Task("even pairs", 2, 1 / 2, even_pairs),
    "mqar": recall(8192),
}
