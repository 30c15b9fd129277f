"""``flash-xlstm prepare``."""

from __future__ import annotations

import argparse
import sys

from tqdm import tqdm

from flash_xlstm.cli.errors import CommandError
from flash_xlstm.training.shards import Index, verify, write_shards


def run(args: argparse.Namespace) -> int:
    """Prepares data as the command line says, or verifies it."""
    if args.verify and args.inputs:
        raise CommandError("--verify checks OUT alone; it takes no INPUT")
    if not args.inputs and not args.verify:
        raise CommandError("no INPUT; give a file or a folder")
    with tqdm(
        unit="B",
        unit_scale=True,
        desc="verifying" if args.verify else "preparing",
        dynamic_ncols=True,
        mininterval=0.1 if sys.stderr.isatty() else 10.0,
    ) as bar:

        def progress(size: int, total: int) -> None:
            bar.total = total
            bar.update(size)

        if args.verify:
            index = verify(args.out, progress)
        else:
            index = write_shards(
                args.inputs,
                args.out,
                tokenizer=args.tokenizer,
                format=args.format,
                field=args.field,
                separator=args.separator,
                end_of_text=None if args.end_of_text == "none" else args.end_of_text,
                held_out=args.held_out,
                shard_tokens=args.shard_tokens,
                progress=progress,
            )
    print(_summary(index))
    print(f"{args.out} is whole" if args.verify else f"train on it with: flash-xlstm train --data {args.out}")
    return 0


def _summary(index: Index) -> str:
    count = index.train.documents + index.held_out.documents
    kind = "bytes" if index.tokenizer is None else f"a vocabulary of {index.vocab_size:,}, as {index.dtype}"
    end = "no end-of-text token" if index.end_of_text is None else f"end-of-text token {index.end_of_text}"
    return (
        f"{count:,} documents: {index.train.tokens:,} tokens to train on, {index.held_out.bytes:,} bytes held out; "
        f"{kind}; {end}"
    )
