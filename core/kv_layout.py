"""The layout of a rank's KV pool, and where a part of a block lies in it.

One tensor per rank, block-major:

    [num_blocks, layers, parts, kv_heads, block_size, head_dim]
         |         |      |      |
         |         |      |      a range of heads of one layer is one run
         |         |      K, V; or one part that is both (multi-head latent attention)
         |         a group of layers of a block is one run
         a whole block is one run

A dtype with scales keeps one float32 for each (block, layer, part, head), right behind the values
that it scales, so that whatever range is read, checked or copied takes its scales along:

    │ block_size × head_dim values │ scale │ 12 zero bytes │ the next head's values …
"""

from collections.abc import Iterator
from dataclasses import asdict, dataclass

from baton.core.errors import InvalidConfig
from baton.core.ids import BlockId

ITEM_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
"""Dtypes that weights and KV may have, with their size in bytes."""
SCALED_ITEM_BYTES = {"float8_e4m3fn": 1}
"""Dtypes that only KV may have, with a scale per (block, layer, part, head)."""
KV_ITEM_BYTES = ITEM_BYTES | SCALED_ITEM_BYTES
"""All dtypes of KV."""
SCALE_BYTES = 16
"""Room of a scale: a float32 and padding, so that every head begins where vector loads want it."""


@dataclass(frozen=True, slots=True, order=True)
class LayerRange:
    """Layers from `start` up to, not including, `end`."""

    start: int
    end: int

    def __len__(self) -> int:
        return self.end - self.start

    def within(self, other: "LayerRange") -> "LayerRange":
        """Return the layers that are in both; of length 0 if there are none."""
        start = max(self.start, other.start)
        return LayerRange(start, max(start, min(self.end, other.end)))

    def counted_from(self, layer: int) -> "LayerRange":
        """Return the same layers, numbered so that `layer` is 0."""
        return LayerRange(self.start - layer, self.end - layer)


@dataclass(frozen=True, slots=True, order=True)
class HeadRange:
    """KV heads from `start` up to, not including, `end`."""

    start: int
    end: int

    def __len__(self) -> int:
        return self.end - self.start

    def within(self, other: "HeadRange") -> "HeadRange":
        """Return the heads that are in both; of length 0 if there are none."""
        start = max(self.start, other.start)
        return HeadRange(start, max(start, min(self.end, other.end)))

    def counted_from(self, head: int) -> "HeadRange":
        """Return the same heads, numbered so that `head` is 0."""
        return HeadRange(self.start - head, self.end - head)


@dataclass(frozen=True, slots=True, order=True)
class SlotRange:
    """Slots of a block, one per token, from `start` up to, not including, `end`."""

    start: int
    end: int

    def __len__(self) -> int:
        return self.end - self.start


@dataclass(frozen=True, slots=True)
class KVLayout:
    """The shape of one block; how many there are is the pool's affair and may differ by side."""

    layers: int
    kv_heads: int
    block_size: int
    """Tokens per block."""
    head_dim: int
    dtype: str
    """A key of KV_ITEM_BYTES."""
    parts: int = 2
    """2 where K and V are apart; 1 where one latent vector per token serves as both."""

    def __post_init__(self) -> None:
        if self.dtype not in KV_ITEM_BYTES:
            raise InvalidConfig("dtype", self.dtype, ", ".join(KV_ITEM_BYTES))
        if self.scaled and self.block_size * self.token_bytes % SCALE_BYTES:
            allowed = f"a multiple of {SCALE_BYTES} values per block, for a dtype with scales"
            raise InvalidConfig("block_size * head_dim", self.block_size * self.head_dim, allowed)

    @property
    def scaled(self) -> bool:
        """Whether each head of a block has a scale behind its values."""
        return self.dtype in SCALED_ITEM_BYTES

    @property
    def runs_per_layer(self) -> int:
        """Runs of block_size × head_dim values that a layer of a block has."""
        return self.parts * self.kv_heads

    @property
    def token_bytes(self) -> int:
        """Bytes of one token's values of one head of one part of one layer."""
        return self.head_dim * KV_ITEM_BYTES[self.dtype]

    @property
    def value_bytes(self) -> int:
        """Bytes of the values of one head of one part of one layer; its scale follows them."""
        return self.block_size * self.token_bytes

    @property
    def head_bytes(self) -> int:
        """Bytes of one head of one part of one layer, its scale included."""
        return self.value_bytes + (SCALE_BYTES if self.scaled else 0)

    @property
    def layer_bytes(self) -> int:
        """Bytes of one layer (all its parts) of one block."""
        return self.runs_per_layer * self.head_bytes

    @property
    def block_bytes(self) -> int:
        """Bytes of one block: the unit of allocation."""
        return self.layers * self.layer_bytes

    def shape(self, num_blocks: int) -> tuple[int, ...]:
        """Return the shape of a pool's values; with scales they are `head_bytes` apart by head."""
        return (
            num_blocks,
            self.layers,
            self.parts,
            self.kv_heads,
            self.block_size,
            self.head_dim,
        )

    def run(self, block: BlockId, layers: LayerRange) -> tuple[int, int]:
        """Return (offset, length) in bytes of a range of layers of one block in the pool."""
        offset = block * self.block_bytes + layers.start * self.layer_bytes
        return offset, len(layers) * self.layer_bytes

    def pieces(
        self, layers: LayerRange, heads: HeadRange, slots: SlotRange
    ) -> Iterator[tuple[int, int]]:
        """Yield (offset, length) in bytes from a block's start of a part of that block.

        One piece per (layer, part, head), in that order, each followed by one of its scale where
        there are scales. Layouts that differ only in block size and in the layers and heads that
        they hold yield the same pieces in the same order, at other offsets.
        """
        for layer in range(layers.start, layers.end):
            for part in range(self.parts):
                for head in range(heads.start, heads.end):
                    at = ((layer * self.parts + part) * self.kv_heads + head) * self.head_bytes
                    yield at + slots.start * self.token_bytes, len(slots) * self.token_bytes
                    if self.scaled:
                        yield at + self.value_bytes, SCALE_BYTES

    @property
    def all_layers(self) -> LayerRange:
        """Every layer of the block."""
        return LayerRange(0, self.layers)

    @property
    def all_heads(self) -> HeadRange:
        """Every KV head of the block."""
        return HeadRange(0, self.kv_heads)

    @property
    def all_slots(self) -> SlotRange:
        """Every slot of the block."""
        return SlotRange(0, self.block_size)

    def blocks_for(self, tokens: int) -> int:
        """Return how many blocks hold `tokens` tokens."""
        return -(-tokens // self.block_size)

    def describe(self) -> dict[str, int | str]:
        """Return the fields by name, for the compatibility hash and the log."""
        return asdict(self)
