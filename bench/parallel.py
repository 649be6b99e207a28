"""Collectives of ranks on this machine by kind and size, and what layouts cost on paper.

    python bench/parallel.py --ranks 2 4 --rounds 30

Every rank is a process with one thread of torch. In a round each way does one call of each size,
begun by all ranks at once, every other round in reverse order, so that all meet the same machine;
shown is the median of rank 0. The ways are Gloo over 127.0.0.1, shared memory on one host
(OneShotGroup), and int8 over Gloo (QuantisedGroup). The last columns are what follows an all-reduce
in a layer, the residual's add and the norm on rows of 2048, by torch's operations one by one and as
in all_reduce_add_norm.

With more ranks than cores the figures tell of correctness and overhead, not of speed-up. The bytes
per token and layer are baton.parallel.cost, which tests compare with the counters.
"""

import argparse
import multiprocessing
import statistics
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from multiprocessing.connection import Connection
from time import perf_counter
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.nn import functional

from baton.parallel.cost import LayerShape, bytes_per_token, layer_costs
from baton.parallel.fused import all_reduce_add_norm
from baton.parallel.group import Group, SoloGroup
from baton.parallel.join import Meeting, join_mesh, listen
from baton.parallel.layered_group import LayeredGroup
from baton.parallel.mesh import Mesh
from baton.parallel.one_shot_group import one_shot
from baton.parallel.quantised_group import QuantisedGroup

PATIENCE_S = 600.0
HIDDEN = 2048
SIZES = tuple(1 << power for power in range(13, 26, 2))
"""Bytes of a rank's float32, of 8 KiB, a row of 2048, and more."""
KINDS = ("all_reduce", "reduce_scatter", "all_gather")
SHAPES = {
    "dense, 32 of 4096, bf16": LayerShape(32, 8192, 4096),
    "experts, 48 of 2048, 8 of 128, bf16": LayerShape(48, 4096, 2048, top_k=8),
}
LAYOUTS = (
    (Mesh(tp=2), False),
    (Mesh(tp=2), True),
    (Mesh(tp=8), False),
    (Mesh(pp=2), False),
    (Mesh(ep=8), False),
    (Mesh(cp=2), False),
    (Mesh(pp=2, tp=4), False),
    (Mesh(ep=2, tp=4), False),
)

Times = dict[tuple[str, str, int], float]
"""Seconds, by kind of call, way and bytes."""


def ways_of(group: Group) -> dict[str, Group]:
    """Return the library's group, and upon it shared memory for all sizes, and int8."""
    while isinstance(group, LayeredGroup):
        group = group.below
    shared = one_shot(group, PATIENCE_S, lambda: None, limit_bytes=max(SIZES))
    assert shared is not None, "all ranks are here"
    return {"Gloo": group, "shared": shared, "int8": QuantisedGroup(group, from_bytes=0)}


def calls_of(ways: dict[str, Group]) -> Iterator[tuple[str, str, int, Callable[[], object]]]:
    """Yield every call to measure: kind, way, bytes of a rank's tensor, and the call."""
    for size in SIZES:
        x = torch.zeros(size // 4 // HIDDEN or 1, min(size // 4, HIDDEN))
        flat = x.flatten()
        for name, way in ways.items():
            part = flat[: flat.numel() // way.size]
            yield "all_reduce", name, size, lambda way=way, x=x: way.all_reduce_(x)
            if name != "int8":
                yield "reduce_scatter", name, size, lambda way=way, x=flat: way.reduce_scatter(x)
                yield "all_gather", name, size, lambda way=way, x=part: way.all_gather(x)
        residual, weight = torch.zeros_like(x), torch.ones(x.shape[1])
        for name, norm in (("one by one", add_norm), ("fused", all_reduce_add_norm)):
            yield (
                "add and norm",
                name,
                size,
                lambda f=norm, x=x, r=residual, w=weight: f(SoloGroup(), x, r, w, 1e-5),
            )


def add_norm(group: Group, x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Do what all_reduce_add_norm does, each operation on all rows."""
    residual += group.all_reduce_(x)
    return functional.rms_norm(residual, weight.shape, weight, eps)


def be_rank(mesh: Mesh, rank: int, rounds: int, pipe: Connection) -> None:
    """Meet the others, measure, and send the times."""
    torch.set_num_threads(1)
    listener = listen("127.0.0.1") if rank == 0 else None
    if listener:
        pipe.send(listener.getsockname()[1])
    meeting = Meeting(mesh, "127.0.0.1", pipe.recv(), "gloo", PATIENCE_S)
    times: dict[tuple[str, str, int], list[float]] = {}
    with join_mesh(meeting, rank, listener) as membership:
        ways = ways_of(membership.ranks.tp)
        calls = list(calls_of(ways))
        for round_ in range(-2, rounds):
            for kind, way, size, call in calls:
                ways["shared"].all_reduce_(torch.zeros(1))  # all begin at once
                since = perf_counter()
                call()
                if round_ >= 0:  # in the first ones pages are touched
                    times.setdefault((kind, way, size), []).append(perf_counter() - since)
            calls.reverse()
    pipe.send({at: statistics.median(found) for at, found in times.items()})


def measure(ranks: int, rounds: int) -> Times:
    """Return rank 0's medians."""
    spawn = multiprocessing.get_context("spawn")
    mesh = Mesh(tp=ranks)
    with ExitStack() as stack:
        pipes: list[Any] = []
        for rank in range(ranks):
            ours, theirs = spawn.Pipe()
            process = spawn.Process(target=be_rank, args=(mesh, rank, rounds, theirs))
            process.start()
            theirs.close()
            stack.callback(process.join, PATIENCE_S)
            stack.callback(ours.close)
            pipes.append(ours)
        port = pipes[0].recv()
        for pipe in pipes:
            pipe.send(port)
        times: list[Times] = [pipe.recv() for pipe in pipes]
    return times[0]


def times_table(ranks: int, times: Times) -> Table:
    """Return microseconds by size, a column for each kind and way."""
    columns = [
        *((kind, way) for kind in KINDS for way in ("Gloo", "shared")),
        ("all_reduce", "int8"),
        ("add and norm", "one by one"),
        ("add and norm", "fused"),
    ]
    rows = Table(f"{ranks} ranks, µs", *(f"{kind}, {way}" for kind, way in columns))
    for size in SIZES:
        cells = [f"{times[kind, way, size] * 1e6:,.0f}" for kind, way in columns]
        rows.add_row(f"{size >> 10:,} KiB", *cells)
    return rows


def cost_table() -> Table:
    """Return KiB per token and layer on a rank, and calls per layer, for every layout."""
    rows = Table("layout", *SHAPES)
    for mesh, scattered in LAYOUTS:
        cells = []
        for shape in SHAPES.values():
            costs = layer_costs(shape, mesh, scattered)
            calls = sum(cost.calls for cost in costs)
            cells.append(f"{bytes_per_token(costs) / 1024:.1f} KiB, {calls:.3g} calls")
        rows.add_row(f"{mesh}{', scattered' * scattered}", *cells)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description="Collectives on this machine, layouts on paper.")
    parser.add_argument("--ranks", type=int, nargs="+", default=[2, 4])
    parser.add_argument("--rounds", type=int, default=30)
    options = parser.parse_args()
    console = Console(width=200)
    for ranks in options.ranks:
        console.print(times_table(ranks, measure(ranks, options.rounds)))
    console.print(cost_table())


if __name__ == "__main__":
    main()
