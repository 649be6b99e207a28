"""Which frequencies a checkpoint's rotary position embedding has."""

import hashlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from baton.core.errors import InvalidConfig
from baton.models.config_file import Fields


@dataclass(frozen=True, slots=True)
class RopeSpec:
    """A rotation of pairs of dimensions; dimensions beyond the pairs are not turned."""

    frequencies: tuple[float, ...]
    """Angle per position of each pair, in double precision."""
    magnitude: float = 1.0
    """What is turned also grows by it."""

    def digest(self) -> str:
        """Return 16 hex digits that name the rotation."""
        return hashlib.sha256(repr(self).encode()).hexdigest()[:16]


@dataclass(frozen=True, slots=True)
class RopeRequest:
    """For what a rotation is wanted."""

    dims: int
    """Dimensions of a head, those that are not turned included."""
    max_length: int
    """Tokens that a sequence may have where it is served."""
    theta: float = 10000.0
    """If the checkpoint names none."""
    partial: bool = False
    """The family knows partial_rotary_factor."""


def read_rope(config: Fields, wanted: RopeRequest) -> RopeSpec:
    """Read config.json in the published form and in that of transformers 5.

    Published: `rope_theta`, and `rope_scaling` with its `rope_type` (or, older, `type`).
    transformers 5: `rope_parameters`, which holds all of it.
    Raises InvalidConfig for kinds that are not known and for parameters that make no sense.
    """
    rope = config.section("rope_parameters") or config.section("rope_scaling") or config
    return rope_of(config, rope, wanted)


def rope_of(config: Fields, rope: Fields, wanted: RopeRequest) -> RopeSpec:
    """Read a rotation from `rope`, and what is missing there from the config's top level."""
    theta = rope.positive("rope_theta", config.positive("rope_theta", wanted.theta))
    dims = _rotary_dims(config, rope, wanted)
    plain = [theta ** (-2 * pair / dims) for pair in range(dims // 2)]
    if rope is config:
        return RopeSpec(tuple(plain))
    kind = rope.choice("rope_type" if rope.has("rope_type") else "type", "default", _KINDS)
    return _KINDS[kind](_Source(config, rope, theta, dims, wanted.max_length), plain)


def _rotary_dims(config: Fields, rope: Fields, wanted: RopeRequest) -> int:
    source = rope if rope.has("partial_rotary_factor") else config
    factor = source.positive("partial_rotary_factor", 1.0)
    if factor > 1 or (factor != 1 and not wanted.partial):
        allowed = "over 0 and up to 1.0" if wanted.partial else "1.0"
        raise InvalidConfig(source.name("partial_rotary_factor"), factor, allowed)
    dims = int(wanted.dims * factor)
    if dims % 2:
        raise InvalidConfig(source.name("partial_rotary_factor"), factor, "an even share of a head")
    return dims


@dataclass(frozen=True, slots=True)
class _Source:
    """Where the parameters of a kind are read from."""

    config: Fields
    rope: Fields
    theta: float
    dims: int
    max_length: int

    def original_length(self) -> int:
        """Return the length that the model was first trained for."""
        field = "original_max_position_embeddings"
        if self.config.has(field):
            return self.config.integer(field, least=2)
        whole = self.config.integer("max_position_embeddings", 2048)
        return self.rope.integer(field, whole, least=2)

    def factor(self) -> float:
        """Return by how much the context was lengthened."""
        whole = self.config.integer("max_position_embeddings", 2048)
        return self.rope.positive("factor", whole / self.original_length())


def _default(source: _Source, plain: Sequence[float]) -> RopeSpec:
    return RopeSpec(tuple(plain))


def _dynamic(source: _Source, plain: Sequence[float]) -> RopeSpec:
    """Return the plain frequencies: others hold beyond max_position_embeddings only."""
    source.rope.positive("factor")
    return RopeSpec(tuple(plain))


def _linear(source: _Source, plain: Sequence[float]) -> RopeSpec:
    factor = source.rope.positive("factor")
    return RopeSpec(tuple(frequency / factor for frequency in plain))


def _llama3(source: _Source, plain: Sequence[float]) -> RopeSpec:
    """Keep high frequencies, divide low ones, and blend those between (Llama 3.1)."""
    rope = source.rope
    low, high = rope.positive("low_freq_factor"), rope.positive("high_freq_factor")
    if high <= low:
        raise InvalidConfig(rope.name("high_freq_factor"), high, f"over low_freq_factor ({low})")
    factor, original = rope.positive("factor"), source.original_length()

    def scaled(frequency: float) -> float:
        turns = original * frequency / (2 * math.pi)
        keep = min(1.0, max(0.0, (turns - low) / (high - low)))
        return (1 - keep) * frequency / factor + keep * frequency

    return RopeSpec(tuple(map(scaled, plain)))


def _yarn(source: _Source, plain: Sequence[float]) -> RopeSpec:
    """Blend divided and plain frequencies by how often a pair turns (Peng et al., 2023)."""
    rope, factor, original = source.rope, source.factor(), source.original_length()

    def pair_that_turns(times: float) -> float:
        return (
            source.dims * math.log(original / (times * 2 * math.pi)) / (2 * math.log(source.theta))
        )

    low = pair_that_turns(rope.positive("beta_fast", 32.0))
    high = pair_that_turns(rope.positive("beta_slow", 1.0))
    if rope.flag("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, source.dims - 1)
    if low == high:
        high += 0.001
    blended = []
    for pair, frequency in enumerate(plain):
        divide = min(1.0, max(0.0, (pair - low) / (high - low)))
        blended.append(divide * frequency / factor + (1 - divide) * frequency)
    return RopeSpec(tuple(blended), _yarn_magnitude(rope, factor))


def _yarn_magnitude(rope: Fields, factor: float) -> float:
    if rope.has("attention_factor"):
        return rope.positive("attention_factor")
    if rope.number("mscale", 0.0) and rope.number("mscale_all_dim", 0.0):
        above = yarn_mscale(factor, rope.positive("mscale"))
        return above / yarn_mscale(factor, rope.positive("mscale_all_dim"))
    return yarn_mscale(factor, 1.0)


def yarn_mscale(factor: float, weight: float) -> float:
    """Return how much attention is sharpened for a context lengthened by `factor`."""
    return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0


def _longrope(source: _Source, plain: Sequence[float]) -> RopeSpec:
    """Divide each frequency by a factor of its own (Ding et al., 2024).

    There are two lists, for short and for long sequences. A sequence's first tokens are computed
    before its length is known, and their KV is shared with other sequences, so that the longest
    sequence that may come decides for all.
    """
    rope, original, factor = source.rope, source.original_length(), source.factor()
    field = "long_factor" if source.max_length > original else "short_factor"
    factors = rope.numbers(field, len(plain))
    magnitude = 1.0
    if factor > 1:
        magnitude = math.sqrt(1 + math.log(factor) / math.log(original))
    return RopeSpec(
        tuple(frequency / by for frequency, by in zip(plain, factors, strict=True)),
        rope.positive("attention_factor", magnitude),
    )


_KINDS: dict[str, Callable[[_Source, Sequence[float]], RopeSpec]] = {
    "default": _default,
    "linear": _linear,
    "dynamic": _dynamic,
    "llama3": _llama3,
    "yarn": _yarn,
    "longrope": _longrope,
    "su": _longrope,  # the name that Phi-3 was first published with
}
