"""Times work on a device: by events and graph replays on a GPU, by the clock elsewhere.

Work is warmed up first, repeated for a given time, and its median is what counts; how far the
repeats spread says which differences are noise. What fits a cache is measured on several sets of
inputs in turn, so that it is read from memory.
"""

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

Call = Callable[[], object]

_LEAST, _MOST = 5, 200  # repeats
_MOST_SETS = 64


@dataclass(frozen=True, slots=True)
class Timing:
    """Seconds of one call."""

    median_s: float
    low_s: float
    """The tenth percentile."""
    high_s: float
    """The ninetieth."""
    repeats: int

    def figures(self) -> dict[str, Any]:
        """Return the fields as they go into a record."""
        return asdict(self)


def timing(seconds: Sequence[float], calls: int = 1) -> Timing:
    """Return the timing of repeats of so many calls each."""
    each = sorted(s / calls for s in seconds)
    tenth = len(each) // 10
    return Timing(statistics.median(each), each[tenth], each[-1 - tenth], len(each))


def input_sets(bytes_per_call: int, cache_bytes: int) -> int:
    """Return how many sets of inputs together are four times a cache; at least 1, at most 64."""
    return max(1, min(_MOST_SETS, -(-4 * cache_bytes // max(1, bytes_per_call))))


def cache_bytes(device: torch.device) -> int:
    """Return the size of the GPU's L2 cache; 0 elsewhere, where one set of inputs will do."""
    if device.type != "cuda":
        return 0
    return int(torch.cuda.get_device_properties(device).L2_cache_size)


def synchronize(device: torch.device) -> None:
    """Wait until the device has done all it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def time_calls(call: Call, device: torch.device, figure_s: float) -> Timing:
    """Time a call as the host makes it, launches and all."""
    call()
    synchronize(device)
    return _repeat(call, device, figure_s, 1)


def time_replays(calls: Sequence[Call], device: torch.device, figure_s: float) -> Timing:
    """Time calls one after the other in one CUDA graph, so that launches cost next to nothing.

    The timing is of one of them. Elsewhere than on a GPU the calls are made.
    """
    if device.type != "cuda":
        return _repeat(lambda: [call() for call in calls], device, figure_s, len(calls))
    graph = capture(calls)
    graph.replay()
    return _repeat(graph.replay, device, figure_s, len(calls))


def capture(calls: Sequence[Call]) -> torch.cuda.CUDAGraph:
    """Return a CUDA graph of calls, each of which has run before: kernels are compiled by then."""
    side = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for call in calls:
            call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    return graph


def _repeat(call: Call, device: torch.device, figure_s: float, calls: int) -> Timing:
    seconds: list[float] = []
    least = _LEAST if device.type == "cuda" else 1
    end = time.perf_counter() + figure_s
    while len(seconds) < least or (len(seconds) < _MOST and time.perf_counter() < end):
        seconds.append(_one(call, device))
    return timing(seconds, calls)


def _one(call: Call, device: torch.device) -> float:
    """Return the seconds of a call: on a GPU those between two events around it."""
    if device.type != "cuda":
        began = time.perf_counter()
        call()
        return time.perf_counter() - began
    first, last = (
        torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        for _ in range(2)
    )
    first.record()
    call()
    last.record()
    last.synchronize()
    return float(first.elapsed_time(last)) / 1e3
