"""What this machine does at best: what every other stage's figures are fractions of."""

import time
from functools import partial
from typing import Any

import torch

from bench.gpu.clock import Timing, capture, time_calls, time_replays
from bench.gpu.read_kernel import maxima_of, read_all
from bench.gpu.stage_run import StageRun


def run(stage: StageRun) -> None:
    """Measure memory, arithmetic, and what a kernel costs that does nothing."""
    stage.case("copy", partial(_copy, stage))
    stage.case("read", partial(_read, stage))
    for sides in stage.scale.products:
        name = "product " + "x".join(map(str, sides))
        stage.case(name, partial(_product, stage, *sides))
    stage.case("graph node", partial(_graph_node, stage))


def _copy(stage: StageRun) -> dict[str, Any]:
    """Bytes read and written count both."""
    size = stage.scale.copy_bytes
    source = torch.empty(size // 4, dtype=torch.int32, device=stage.device).random_()
    target = torch.empty_like(source)
    found = time_calls(lambda: target.copy_(source), stage.device, stage.scale.figure_s)
    assert target.equal(source)
    return _rate("bytes", 2 * size, found)


def _read(stage: StageRun) -> dict[str, Any]:
    """The better of torch's maximum and a kernel of ours: what a pass over weights could reach."""
    size = stage.scale.copy_bytes
    memory = torch.empty(size // 4, dtype=torch.int32, device=stage.device).random_()
    maxima = maxima_of(memory)
    device, figure_s = stage.device, stage.scale.figure_s
    own = time_calls(lambda: read_all(memory, maxima), device, figure_s)
    assert maxima.amax().equal(memory.amax()), "not all was read"
    floats = torch.randn(size // 4, device=device)
    torchs = time_calls(floats.amax, device, figure_s)
    best = min(own, torchs, key=lambda t: t.median_s)
    return _rate("bytes", size, best) | {"own_s": own.median_s, "torch_s": torchs.median_s}


def _product(stage: StageRun, m: int, n: int, k: int) -> dict[str, Any]:
    """Random data: on zeros the chip draws less power and clocks higher."""
    left = torch.randn(m, k, device=stage.device, dtype=stage.dtype)
    right = torch.randn(n, k, device=stage.device, dtype=stage.dtype).T
    out = torch.empty(m, n, device=stage.device, dtype=stage.dtype)
    call = partial(torch.mm, left, right, out=out)
    for _ in range(3):
        call()
    found = time_calls(call, stage.device, stage.scale.figure_s)
    return _rate("flops", 2 * m * n * k, found)


def _graph_node(stage: StageRun) -> dict[str, Any]:
    """Device time of a kernel with nothing to do, in a graph; and the host's for a replay."""
    nodes, device = stage.scale.graph_nodes, stage.device
    one = torch.zeros(1, device=device)
    calls = [lambda: one.add_(1)] * nodes
    found = time_replays(calls, device, stage.scale.figure_s)
    figures = {"node_s": found.median_s, **found.figures()}
    if device.type == "cuda":
        graph = capture(calls[:100])
        graph.replay()
        torch.cuda.synchronize(device)
        began = time.perf_counter()
        for _ in range(20):
            graph.replay()
        figures["replay_host_s"] = (time.perf_counter() - began) / 20
        torch.cuda.synchronize(device)
    return figures


def _rate(what: str, amount: int, found: Timing) -> dict[str, Any]:
    return {f"{what}_s": amount / found.median_s, what: amount, **found.figures()}
