"""Tags every token with a bidirectional sLSTM, beside one that reads from the left alone.

``python examples/tagging.py`` trains both on sequences that are made here. They are words, with marks of two kinds
between them. A word's tag is the kind of the next mark, so that it cannot be told from what came before. Rows have
different lengths, told by a padding mask. Needs torch and tqdm alone.
"""

from __future__ import annotations

import argparse

import torch
from torch import Tensor, nn
from tqdm import trange

from flash_xlstm.nn import BiSLSTM
from flash_xlstm.nn.block_stack import (
    FeedForwardConfig,
    GatedFeedForward,
    sLSTMBlock,
    sLSTMBlockConfig,
    sLSTMLayerConfig,
    xLSTMBlock,
)
from flash_xlstm.training.device import choose_device

MARKS, WORDS = 2, 20  # ids 0 and 1 are the marks, the others words
SHORTEST, LONGEST = 10, 40
IGNORED = -100  # the tag at marks and at padding, which does not count


def batch_of(rows: int, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens (rows, 40), where there is padding (True), on the right, and tags."""
    ids = torch.randint(MARKS, MARKS + WORDS, (rows, LONGEST), generator=generator)
    marks = torch.randint(MARKS, (rows, LONGEST), generator=generator)
    ids = torch.where(torch.rand(rows, LONGEST, generator=generator) < 0.2, marks, ids)
    lengths = torch.randint(SHORTEST, LONGEST + 1, (rows,), generator=generator)
    ids[torch.arange(rows), lengths - 1] = marks[:, 0]  # the last token is a mark
    padding = torch.arange(LONGEST) >= lengths[:, None]
    tags = torch.full_like(ids, IGNORED)
    ahead = torch.full((rows,), IGNORED)
    for t in reversed(range(LONGEST)):
        is_mark = ids[:, t] < MARKS
        tags[:, t] = torch.where(is_mark | padding[:, t], IGNORED, ahead)
        ahead = torch.where(is_mark & ~padding[:, t], ids[:, t], ahead)
    return ids, padding, tags


class Tagger(nn.Module):
    """An embedding, one residual block around an sLSTM, and a linear layer: (rows, tokens) to (rows, tokens, 2)."""

    def __init__(self, width: int, both_directions: bool) -> None:
        super().__init__()
        layer = sLSTMLayerConfig(embedding_dim=width, num_heads=2)
        feed_forward = FeedForwardConfig(embedding_dim=width)
        self.embedding = nn.Embedding(MARKS + WORDS, width)
        if both_directions:
            self.block = xLSTMBlock(BiSLSTM(layer), GatedFeedForward(feed_forward))
        else:
            self.block = sLSTMBlock(sLSTMBlockConfig(layer, feed_forward))
        self.block.reset_parameters()
        self.tag = nn.Linear(width, MARKS)

    def forward(self, ids: Tensor, padding: Tensor) -> Tensor:
        return self.tag(self.block(self.embedding(ids), padding=padding))


def train(model: Tagger, args: argparse.Namespace) -> float:
    """Trains the model. Returns the share of right tags in new sequences."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    generator = torch.Generator().manual_seed(1)
    progress = trange(args.steps, unit="step", dynamic_ncols=True)
    for _ in progress:
        ids, padding, tags = (t.to(args.device) for t in batch_of(args.batch, generator))
        loss = nn.functional.cross_entropy(model(ids, padding).flatten(0, 1), tags.flatten(), ignore_index=IGNORED)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        progress.set_postfix_str(f"loss {float(loss.detach()):.3f}", refresh=False)
    ids, padding, tags = (t.to(args.device) for t in batch_of(256, torch.Generator().manual_seed(2)))
    with torch.no_grad():
        right = model.eval()(ids, padding).argmax(-1) == tags
    return float(right[tags != IGNORED].float().mean())


def positive(text: str) -> int:
    """Reads a count of at least 1. argparse names the option in its error."""
    if int(text) < 1:
        raise ValueError(text)
    return int(text)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=positive, default=150)
    parser.add_argument("--batch", type=positive, default=32)
    parser.add_argument("--width", type=positive, default=32)
    parser.add_argument("--device", type=choose_device, default="auto", help="cpu, cuda or cuda:N")
    args = parser.parse_args(argv)
    shares = {}
    for name, both in (("from the left", False), ("in both directions", True)):
        torch.manual_seed(0)
        shares[name] = train(Tagger(args.width, both).to(args.device), args)
        print(f"reading {name}: {shares[name]:.1%} of the tags right")
    return 0 if shares["in both directions"] > shares["from the left"] else 1


if __name__ == "__main__":
    raise SystemExit(main())
