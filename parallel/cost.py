"""What one layer of a sharded model costs in messages, on paper.

Bytes are those that cross a rank's link in the busier direction, per token of that rank's stream:
the tokens of its place along dp and ep, and of its piece of a prompt along cp. They are what
CountedGroup counts; tests compare them. Not in it are the ends of the model, the embedding's
all-reduce and the sampler's gathers, which come once a step.

    axis, layout       collectives of a layer                      bytes per token, row of B bytes
    tp                 2 all-reduces                               4 B (tp - 1) / tp
    tp, scattered      2 reduce-scatters and 2 all-gathers         4 B (tp - 1) / tp
    pp                 a send and a receive per stage              B pp / layers
    dp                 none
    ep                 2 all-to-alls, and one of row counts        2 top_k B (ep - 1) / ep
    cp                 the pieces' K and V around the ring         (cp - 1) K and V
"""

from dataclasses import dataclass

from baton.parallel.mesh import Axis, Mesh


@dataclass(frozen=True, slots=True)
class LayerShape:
    """What decides the size of a layer's messages; the layers are taken to be alike."""

    layers: int
    row_bytes: int
    """Of one token's hidden state."""
    kv_row_bytes: int
    """Of one token's K and V in one layer, as much as one rank along tp holds."""
    top_k: int = 0
    """Experts that a token chooses; 0 in a dense model."""


@dataclass(frozen=True, slots=True)
class Cost:
    """The calls of one kind in one layer, on one rank."""

    axis: Axis
    kind: str
    """As in Traffic.stats()."""
    calls: float
    """Per step and layer; a stage's send is spread over its layers."""
    bytes_per_token: float


def layer_costs(shape: LayerShape, mesh: Mesh, scattered: bool = False) -> tuple[Cost, ...]:
    """Return what a layer costs a rank that has peers along the axes of the mesh.

    `scattered` says that norms are done on a part of the tokens each (sequence parallelism). Along
    pp it is a rank with stages before and after; along ep each token's experts are taken to be
    spread evenly, redundant copies included, and the all-to-all of counts, whose bytes do not grow
    with the tokens, is a call without bytes; along cp the pieces are taken to be equal.
    """
    costs: list[Cost] = []
    if mesh.tp > 1:
        costs += _tensor_parallel(shape.row_bytes, mesh.tp, scattered)
    if mesh.pp > 1:
        calls = mesh.pp / shape.layers
        sent = shape.row_bytes * calls / (mesh.tp if scattered else 1)
        costs += [Cost("pp", "send", calls, sent), Cost("pp", "receive", calls, sent)]
    if mesh.ep > 1 and shape.top_k:
        away = (mesh.ep - 1) / mesh.ep
        costs.append(Cost("ep", "all_to_all", 3, 2 * shape.top_k * shape.row_bytes * away))
    if mesh.cp > 1:
        hops = mesh.cp - 1
        costs.append(Cost("cp", "all_to_all", hops, hops * shape.kv_row_bytes))
    return tuple(costs)


def bytes_per_token(costs: tuple[Cost, ...]) -> float:
    """Return what all calls of a layer move per token; in and out of a stage are two links' work.

    A link carries both directions at once: of a send and a receive the greater counts.
    """
    received = sum(cost.bytes_per_token for cost in costs if cost.kind == "receive")
    sent = sum(cost.bytes_per_token for cost in costs if cost.kind == "send")
    others = sum(c.bytes_per_token for c in costs if c.kind not in ("send", "receive"))
    return others + max(sent, received)


def _tensor_parallel(row_bytes: int, tp: int, scattered: bool) -> list[Cost]:
    """Return the sums after attention and after the MLP."""
    half = 2 * row_bytes * (tp - 1) / tp
    if scattered:
        return [Cost("tp", "reduce_scatter", 2, half), Cost("tp", "all_gather", 2, half)]
    return [Cost("tp", "all_reduce", 2, 2 * half)]
