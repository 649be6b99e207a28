"""Collectives of ranks on this machine by kind and size, and what layouts cost on paper.

    python bench/parallel.py --ranks 2 4 --rounds 30

Prints Markdown. Every rank is a process with one thread of torch. In a round each way does one call
of each size, begun by all ranks at once, every other round in reverse order, so that all meet the
same machine; shown is the median of rank 0. The ways are Gloo over 127.0.0.1, shared memory on one
host (OneShotGroup), and int8 over Gloo (QuantisedGroup). An all-to-all sends each rank as many
rows, but one fewer to the next. "sum, add and norm" is an all-reduce with what follows it in a
layer, the residual's addition and the norm of rows of 2048: by shared memory one operation after
the other, as one call, which reads the other ranks' addends where they lie, and over Gloo as one
call.

Below each table is the size from which on Gloo is the faster way, by kind: what LIMIT_BYTES of
baton.parallel.one_shot_group was chosen by.

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
from torch import Tensor
from transfer import table

from baton.kernels.rms_norm import rms_norm
from baton.models.blocks.norms import Norm
from baton.parallel.cost import LayerShape, bytes_per_token, layer_costs
from baton.parallel.group import Group
from baton.parallel.join import Meeting, join_mesh, listen
from baton.parallel.layered_group import LayeredGroup
from baton.parallel.mesh import Mesh
from baton.parallel.one_shot_group import one_shot
from baton.parallel.quantised_group import QuantisedGroup
from baton.parallel.token_rows import AllRows

PATIENCE_S = 600.0
HIDDEN = 2048
SIZES = tuple(1 << power for power in range(13, 26, 2))
"""Bytes of a rank's float32, of 8 KiB, a row of 2048, and more."""
KINDS = ("all_reduce", "reduce_scatter", "all_gather", "all_to_all")
ADD_NORM = "sum, add and norm"
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
    (Mesh(dp=2, ep=4), False),
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
                yield "all_to_all", name, size, exchange(way, flat)
                yield ADD_NORM, name, size, add_norm(way, x)
        yield ADD_NORM, "one by one", size, add_norm_one_by_one(ways["shared"], x)


def exchange(way: Group, flat: Tensor) -> Callable[[], object]:
    """Return an uneven all-to-all of nearly all of `flat`, a column."""
    each, after = flat.numel() // way.size, (way.rank + 1) % way.size
    sent = [each - (rank == after) for rank in range(way.size)]
    received = [each - ((rank + 1) % way.size == way.rank) for rank in range(way.size)]
    x = flat[: sum(sent)]
    return lambda: way.all_to_all(x, sent, received)


def add_norm(way: Group, x: Tensor) -> Callable[[], object]:
    """Return what models do after a row-parallel matrix, in one call."""
    rows, norm, stream = AllRows(way, x.shape[0]), Norm(torch.ones(x.shape[1]), 1e-5), x.clone()
    return lambda: rows.add_norm_(x, stream, norm)


def add_norm_one_by_one(way: Group, x: Tensor) -> Callable[[], object]:
    """Return the same, operation by operation."""
    weight, stream = torch.ones(x.shape[1]), x.clone()
    return lambda: rms_norm(stream.add_(way.all_reduce_(x)), weight, 1e-5)


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


def times_table(ranks: int, times: Times) -> str:
    """Return microseconds by size, a column for each kind and way."""
    columns = [
        *((kind, way) for kind in KINDS for way in ("Gloo", "shared")),
        ("all_reduce", "int8"),
        *((ADD_NORM, way) for way in ("Gloo", "one by one", "shared")),
    ]
    rows = []
    for size in SIZES:
        cells = [f"{times[kind, way, size] * 1e6:,.0f}" for kind, way in columns]
        rows.append([f"{size >> 10:,} KiB", *cells])
    return table([f"{ranks} ranks, µs", *(f"{kind}, {way}" for kind, way in columns)], rows)


def crossings(times: Times) -> str:
    """Say from which of the sizes on, and at all greater ones, Gloo is the faster way."""
    found = []
    for kind in (*KINDS, ADD_NORM):
        slower = [size for size in SIZES if times[kind, "shared", size] > times[kind, "Gloo", size]]
        faster = [size for size in SIZES if size not in slower]
        beyond = [size for size in slower if size > max(faster, default=0)]
        at = f"{min(beyond) >> 10:,} KiB" if beyond else "no size"
        found.append(f"{kind.replace('_', '-')}: {at}")
    return f"Gloo is the faster way from here on: {', '.join(found)}."


def cost_table() -> str:
    """Return KiB per token and layer on a rank, and calls per layer, for every layout."""
    rows = []
    for mesh, scattered in LAYOUTS:
        cells = []
        for shape in SHAPES.values():
            costs = layer_costs(shape, mesh, scattered)
            calls = sum(cost.calls for cost in costs)
            cells.append(f"{bytes_per_token(costs) / 1024:.1f} KiB, {calls:.3g} calls")
        rows.append([f"{mesh}{', scattered' * scattered}", *cells])
    return table(["layout", *SHAPES], rows)


def main() -> None:
    parser = argparse.ArgumentParser(description="Collectives on this machine, layouts on paper.")
    parser.add_argument("--ranks", type=int, nargs="+", default=[2, 4])
    parser.add_argument("--rounds", type=int, default=30)
    options = parser.parse_args()
    for ranks in options.ranks:
        times = measure(ranks, options.rounds)
        print(times_table(ranks, times), crossings(times), sep="\n\n", end="\n\n")
    print(cost_table())


if __name__ == "__main__":
    main()
