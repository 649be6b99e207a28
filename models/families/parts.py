"""What several families read alike."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from baton.core.errors import InvalidConfig
from baton.models.config_file import Fields
from baton.models.decoder_spec import AttentionSpec, LayerSpec, MlpSpec, MoeSpec
from baton.models.rope_spec import RopeRequest, read_rope

SLIDING, FULL = "sliding_attention", "full_attention"

Windows = tuple[int | None, ...]


@dataclass(frozen=True, slots=True)
class Heads:
    """The sizes of grouped-query attention."""

    heads: int
    kv_heads: int
    head_dim: int


def read_heads(config: Fields, head_dim: int | None = None) -> Heads:
    """Read the sizes; without a `head_dim` of the family's, heads share the hidden size."""
    heads = config.integer("num_attention_heads")
    hidden = config.integer("hidden_size")
    if head_dim is None:
        if not config.has("head_dim") and hidden % heads:
            raise InvalidConfig(config.name("hidden_size"), hidden, f"a multiple of {heads} heads")
        head_dim = hidden // heads
    found = Heads(
        heads, config.integer("num_key_value_heads", heads), config.integer("head_dim", head_dim)
    )
    if found.head_dim % 2:
        raise InvalidConfig(config.name("head_dim"), found.head_dim, "an even number")
    if heads % found.kv_heads:
        raise InvalidConfig(
            config.name("num_key_value_heads"), found.kv_heads, f"a divisor of {heads} query heads"
        )
    return found


def read_attention(
    config: Fields, max_length: int, *, theta: float = 10000.0, head_dim: int | None = None
) -> AttentionSpec:
    """Read plain attention as Llama has it, without bias; families add what they add."""
    sizes = read_heads(config, head_dim)
    return AttentionSpec(
        heads=sizes.heads,
        kv_heads=sizes.kv_heads,
        head_dim=sizes.head_dim,
        rope=read_rope(config, RopeRequest(sizes.head_dim, max_length, theta)),
        scale=sizes.head_dim**-0.5,
    )


def read_mlp(config: Fields, *, bias: bool = False) -> MlpSpec:
    """Read a SwiGLU feed-forward layer."""
    config.choice("hidden_act", "silu", ("silu",))
    return MlpSpec(config.integer("intermediate_size"), bias=bias)


def read_windows(config: Fields, slides: Callable[[int], bool], default: int | None) -> Windows:
    """Return each layer's sliding window: by `layer_types` or else where `slides(layer)` says.

    Without a `sliding_window`, and without a default, no layer has one.
    """
    layers = config.integer("num_hidden_layers")
    kinds = config.words("layer_types", layers, (SLIDING, FULL))
    if kinds is None:
        kinds = [SLIDING if slides(layer) else FULL for layer in range(layers)]
    if default is None and not config.has("sliding_window"):
        return (None,) * layers
    window = config.integer("sliding_window", default)
    return tuple(window if kind == SLIDING else None for kind in kinds)


def read_window(config: Fields) -> Windows:
    """Return the one sliding window of all layers, if there is one."""
    config.without("layer_types", None, "none: in this family all layers have the same window")
    return read_windows(config, lambda layer: True, None)


def stack(
    attention: AttentionSpec, windows: Windows, mlps: Sequence[MlpSpec | MoeSpec]
) -> tuple[LayerSpec, ...]:
    """Return layers of one attention, each with its own window and feed-forward part."""
    return tuple(
        LayerSpec(replace(attention, window=window), mlp)
        for window, mlp in zip(windows, mlps, strict=True)
    )
