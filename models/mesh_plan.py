"""Which meshes a model can be spread over, and how its layers are cut into stages."""

from collections.abc import Iterator
from math import gcd

from baton.core.errors import InvalidConfig
from baton.core.kv_layout import ITEM_BYTES
from baton.models.decoder_spec import (
    AttentionSpec,
    LatentAttentionSpec,
    LayerSpec,
    MlpSpec,
    MoeSpec,
)
from baton.models.spec import ModelSpec
from baton.parallel.mesh import AXES, Axis, Mesh
from baton.parallel.stages import balanced_stages


def check_mesh(spec: ModelSpec, mesh: Mesh) -> None:
    """Raise InvalidConfig that names an axis whose size the model has no use for, and those it has.

    Sizes of tp divide query heads and the widths of feed-forward layers, and divide the KV heads or
    are a multiple of them; those of ep divide the experts; those of pp are up to the layers. Those
    of dp and cp are free.
    """
    for axis in AXES:
        sizes = usable_sizes(spec, axis)
        if sizes is not None and mesh.length(axis) not in sizes:
            named = ", ".join(str(size) for size in sizes)
            raise InvalidConfig(
                axis, mesh.length(axis), f"one of {named} for {_reason(spec, axis)}"
            )


def usable_sizes(spec: ModelSpec, axis: Axis) -> tuple[int, ...] | None:
    """Return the sizes that an axis may have for a model; None for any."""
    layers = spec.decoder.layers
    if axis == "pp":
        return tuple(range(1, spec.layers + 1))
    if axis == "ep":
        return _divisors(gcd(*_experts(spec)) or 1)
    if axis in ("dp", "cp"):
        return None
    common = gcd(*(layer.attention.heads for layer in layers), *_widths(spec))
    kv_heads = {a.kv_heads for layer in layers if isinstance(a := layer.attention, AttentionSpec)}
    return tuple(
        size
        for size in _divisors(common)
        if size <= spec.vocab_size and all(n % size == 0 or size % n == 0 for n in kv_heads)
    )


def plan_stages(spec: ModelSpec, pp: int, *, dtype: str, kv_bytes: int) -> tuple[int, ...]:
    """Return the first layer of each stage but the first, balanced by the bytes of weights and KV.

    `dtype` is that of the weights; `kv_bytes` is the size of all layers' KV together. Decoding
    reads both in every step, so that stages of like size also take like time.
    """
    item = ITEM_BYTES[dtype]
    kv = kv_bytes // spec.layers
    costs = [item * layer_parameters(layer, spec.hidden) + kv for layer in spec.decoder.layers]
    end = item * spec.vocab_size * spec.hidden
    return balanced_stages(costs, pp, first=end, last=end)


def layer_parameters(layer: LayerSpec, hidden: int) -> int:
    """Return how many weights the matrices of a layer have."""
    return _attention_parameters(layer.attention, hidden) + _mlp_parameters(layer.mlp, hidden)


def _attention_parameters(spec: AttentionSpec | LatentAttentionSpec, hidden: int) -> int:
    if isinstance(spec, AttentionSpec):
        return 2 * (spec.heads + spec.kv_heads) * spec.head_dim * hidden
    width, squeeze = hidden, 0
    if spec.query_rank is not None:
        width, squeeze = spec.query_rank, spec.query_rank * hidden
    q = spec.heads * (spec.nope_dim + spec.rope_dim) * width
    kv = (spec.kv_rank + spec.rope_dim) * hidden
    heads = spec.heads * (spec.nope_dim + spec.value_dim) * spec.kv_rank
    return squeeze + q + kv + heads + spec.heads * spec.value_dim * hidden


def _mlp_parameters(spec: MlpSpec | MoeSpec, hidden: int) -> int:
    if isinstance(spec, MlpSpec):
        return 3 * spec.intermediate * hidden
    shared = _mlp_parameters(spec.shared, hidden) if spec.shared is not None else 0
    return shared + spec.routing.experts * (3 * spec.intermediate + 1) * hidden


def _experts(spec: ModelSpec) -> Iterator[int]:
    for layer in spec.decoder.layers:
        if isinstance(layer.mlp, MoeSpec):
            yield layer.mlp.routing.experts


def _widths(spec: ModelSpec) -> Iterator[int]:
    for layer in spec.decoder.layers:
        yield layer.mlp.intermediate
        if isinstance(layer.mlp, MoeSpec) and layer.mlp.shared is not None:
            yield layer.mlp.shared.intermediate


def _divisors(count: int) -> tuple[int, ...]:
    return tuple(size for size in range(1, count + 1) if count % size == 0)


def _reason(spec: ModelSpec, axis: Axis) -> str:
    if axis == "pp":
        return f"{spec.layers} layers"
    if axis == "ep":
        experts = sorted(set(_experts(spec)))
        return f"{' and '.join(map(str, experts))} experts" if experts else "a model without any"
    heads, kv_heads = spec.decoder.layers[0].attention.heads, spec.kv_layout(1, "float32").kv_heads
    widths = " and ".join(str(width) for width in sorted(set(_widths(spec))))
    return f"{heads} query heads, {kv_heads} KV heads and feed-forward widths of {widths}"
