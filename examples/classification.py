"""Classifies sequences of different lengths, padded to one length, with a padding mask.

``python examples/classification.py`` trains a small model on sequences that are made here. A sequence is random tokens,
some of them keywords; its class is the keyword that came last. The model is a head on the xLSTM, which
``from_pretrained`` puts on a language model's checkpoint as well. Needs transformers and tqdm.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from torch import Tensor
from tqdm import trange

from flash_xlstm.models import xLSTMConfig, xLSTMForSequenceClassification
from flash_xlstm.training.device import choose_device

PADDING, KEYWORDS, WORDS = 0, 4, 40  # ids: padding, 1 to 4 the keywords, up to 40 other words
SHORTEST, LONGEST = 5, 40
EXPECTED = 0.9  # the default settings reach more


def batch_of(rows: int, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens (rows, 40), padded on the right; their mask, 1 at tokens; and the classes (rows,)."""
    ids = torch.randint(KEYWORDS + 1, WORDS + 1, (rows, LONGEST), generator=generator)
    keywords = torch.randint(1, KEYWORDS + 1, (rows, LONGEST), generator=generator)
    ids = torch.where(torch.rand(rows, LONGEST, generator=generator) < 0.15, keywords, ids)
    ids[:, 0] = keywords[:, 0]  # there is always one
    lengths = torch.randint(SHORTEST, LONGEST + 1, (rows, 1), generator=generator)
    places = torch.arange(LONGEST)
    mask = places < lengths
    ids = torch.where(mask, ids, PADDING)
    last = torch.where((ids > PADDING) & (ids <= KEYWORDS), places, -1).argmax(1)
    return ids, mask.long(), ids[torch.arange(rows), last] - 1


@torch.no_grad()
def accuracy(model: xLSTMForSequenceClassification, ids: Tensor, mask: Tensor, classes: Tensor) -> float:
    """The share of sequences whose class is the model's first choice."""
    return float((model(ids, attention_mask=mask).logits.argmax(-1) == classes).float().mean())


@torch.no_grad()
def effect_of_padding(model: xLSTMForSequenceClassification, ids: Tensor, mask: Tensor) -> float:
    """The largest difference between a padded row's logits and those of the row by itself."""
    together = model(ids, attention_mask=mask).logits
    alone = [model(row[kept.bool()][None]).logits[0] for row, kept in zip(ids, mask, strict=True)]
    return float((together - torch.stack(alone)).abs().max())


def positive(text: str) -> int:
    """Reads a count of at least 1. argparse names the option in its error."""
    if int(text) < 1:
        raise ValueError(text)
    return int(text)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help="folder for the trained model; default: it is not kept")
    parser.add_argument("--steps", type=positive, default=150)
    parser.add_argument("--batch", type=positive, default=32)
    parser.add_argument("--width", type=positive, default=64)
    parser.add_argument("--device", type=choose_device, default="auto", help="cpu, cuda or cuda:N")
    args = parser.parse_args(argv)
    torch.manual_seed(0)
    config = xLSTMConfig(
        vocab_size=WORDS + 1, hidden_size=args.width, num_hidden_layers=2, num_heads=2, num_labels=KEYWORDS,
        pad_token_id=PADDING, bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    model = xLSTMForSequenceClassification(config).to(args.device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    generator = torch.Generator().manual_seed(1)
    progress = trange(args.steps, unit="step", dynamic_ncols=True)
    for _ in progress:
        ids, mask, classes = (t.to(args.device) for t in batch_of(args.batch, generator))
        loss = model(ids, attention_mask=mask, labels=classes).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        progress.set_postfix_str(f"loss {float(loss.detach()):.3f}", refresh=False)
    model.eval()
    ids, mask, classes = (t.to(args.device) for t in batch_of(256, torch.Generator().manual_seed(2)))
    share = accuracy(model, ids, mask, classes)
    print(f"{share:.1%} of 256 new sequences right; chance is {1 / KEYWORDS:.0%}")
    print(f"padding moves the logits by {effect_of_padding(model, ids[:16], mask[:16]):.1e} at most")
    if args.out:
        model.save_pretrained(args.out)
    if share <= EXPECTED:
        print(f"that is not more than the {EXPECTED:.0%} expected; more --steps may get there")
        return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
