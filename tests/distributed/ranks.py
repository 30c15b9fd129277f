"""Processes that gloo joins, forked off one that has imported what they need; with GPUs, which a fork cannot use, new
ones."""

from __future__ import annotations

import importlib
import multiprocessing
import os
import time
import traceback
from datetime import timedelta

import torch
from torch import distributed as dist

SECONDS = 120

_forked = multiprocessing.get_context("forkserver")
_forked.set_forkserver_preload(["torch", "torch.distributed.tensor", "flash_xlstm.models", "ranks"])


def run(world, folder, module, function, args, on_gpus=False):
    """Results by rank. A rank's error is raised here; none may take longer than SECONDS."""
    store = folder / f"store-{time.monotonic_ns()}"
    processes = multiprocessing.get_context("spawn") if on_gpus else _forked
    pipes = [processes.Pipe(duplex=False) for _ in range(world)]
    started = [
        processes.Process(target=_rank, args=(rank, world, str(store), send, module, function, args), daemon=True)
        for rank, (_, send) in enumerate(pipes)
    ]
    for process, (_, send) in zip(started, pipes, strict=True):
        process.start()
        send.close()
    results, end = {}, time.monotonic() + SECONDS
    try:
        for rank, (receive, _) in enumerate(pipes):
            if not receive.poll(max(0.0, end - time.monotonic())):
                raise TimeoutError(f"rank {rank} of {function} was not done within {SECONDS} s")
            try:
                error, results[rank] = receive.recv()
            except EOFError:
                raise RuntimeError(f"rank {rank} of {function} died") from None
            if error:
                raise RuntimeError(f"rank {rank} of {function}:\n{error}")
    finally:
        for process in started:
            if len(results) < world:
                process.kill()
            process.join()
    return [results[rank] for rank in range(world)]


def _rank(rank, world, store, send, module, function, args):
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(world), "LOCAL_RANK": str(rank)}
    error = result = None
    try:
        dist.init_process_group(
            "gloo", init_method=f"file://{store}", rank=rank, world_size=world, timeout=timedelta(seconds=SECONDS)
        )
        result = getattr(importlib.import_module(module), function)(*args)
        dist.barrier()
        dist.destroy_process_group()
    except BaseException:
        error = traceback.format_exc()
    send.send((error, result))
