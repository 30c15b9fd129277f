"""Times of calls inside a CUDA graph, in which no kernel waits for the host."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence

import torch

from run import median_time_ms


def capture(function: Callable[[], object]) -> torch.cuda.CUDAGraph:
    """A graph of one call, captured after two calls to warm up."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            function()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        function()
    return graph


def time_in_graph_ms(calls: Sequence[Callable[[], object]], device: torch.device, budget_s: float = 0.3) -> float:
    """Median time of one of `calls`, which run in sequence in one graph. On a CPU, the median time of a single call.

    If the calls' operands together exceed the L2 cache, each call reads its operands from memory, as in a model. A
    graph has at least 16 calls and runs for 5 ms or more, so that its launch and the write-back of tens of MB in the
    cache do not count.
    """
    if device.type != "cuda":
        return statistics.median(median_time_ms(call, device, budget_s=budget_s / len(calls)) for call in calls)

    def measure(rounds: int, budget_s: float) -> float:
        graph = capture(lambda: [call() for _ in range(rounds) for call in calls])
        return median_time_ms(graph.replay, device, budget_s=budget_s) / (rounds * len(calls))

    rounds = -(-16 // len(calls))
    estimate_ms = measure(rounds, budget_s / 10)
    return measure(max(rounds, math.ceil(5.0 / (estimate_ms * len(calls)))), budget_s)


def copies_beyond_cache(bytes_each: float, device: torch.device) -> int:
    """The number of sets of operands of `bytes_each` that exceed the caches several times over; at most 64."""
    beyond = 2**28 if device.type == "cuda" else 2**20
    return max(1, min(64, round(beyond / bytes_each)))
