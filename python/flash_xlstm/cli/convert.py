"""``flash-xlstm convert``."""

from __future__ import annotations

import argparse
import resource
import sys

from tqdm import tqdm

from flash_xlstm.cli.errors import CommandError
from flash_xlstm.integrations.convert import convert


def run(args: argparse.Namespace) -> int:
    """Converts a checkpoint as the command line says."""
    with tqdm(
        unit="B",
        unit_scale=True,
        desc="converting",
        dynamic_ncols=True,
        mininterval=0.1 if sys.stderr.isatty() else 10.0,
    ) as bar:

        def progress(size: int, total: int) -> None:
            bar.total = total
            bar.set_description("converting and verifying", refresh=False)
            bar.update(size)

        try:
            made = convert(args.source, args.target, max_shard_size=args.max_shard_size, progress=progress)
        except (ValueError, TypeError) as error:
            bar.close()
            raise CommandError(" ".join(str(error).split())) from error
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(
        f"{made.tensors} tensors, {made.nbytes:,} bytes, from the format {made.source} to {made.target} in "
        f"{len(made.files)} {'file' if len(made.files) == 1 else 'files'}; {args.target} was read again and is the same"
    )
    print(f"memory of this process: {peak:,.0f} MiB at most")
    return 0
