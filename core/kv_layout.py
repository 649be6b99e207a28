"""The layout of a rank's KV pool, and where a part of a block lies in it.

One tensor per rank, block-major:

    [num_blocks, layers, parts, kv_heads, block_size, head_dim]
         |         |      |      |
         |         |      |      a range of heads of one layer is one run
         |         |      K, V; or one part that is both (multi-head latent attention)
         |         a group of layers of a block is one run
         a whole block is one run
"""

from dataclasses import asdict, dataclass

from baton.core.ids import BlockId

ITEM_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
"""KV dtypes by name, with their size in bytes."""


@dataclass(frozen=True, slots=True)
class LayerRange:
    """Layers from `start` up to, not including, `end`."""

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
    """A key of ITEM_BYTES."""
    parts: int = 2
    """2 where K and V are apart; 1 where one latent vector per token serves as both."""

    @property
    def runs_per_layer(self) -> int:
        """Runs of block_size × head_dim values that a layer of a block has."""
        return self.parts * self.kv_heads

    @property
    def layer_bytes(self) -> int:
        """Bytes of one layer (all its parts) of one block."""
        return self.runs_per_layer * self.block_size * self.head_dim * ITEM_BYTES[self.dtype]

    @property
    def block_bytes(self) -> int:
        """Bytes of one block: the unit of allocation."""
        return self.layers * self.layer_bytes

    def shape(self, num_blocks: int) -> tuple[int, ...]:
        """Return the shape of a pool's tensor."""
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

    @property
    def all_layers(self) -> LayerRange:
        """Every layer of the block."""
        return LayerRange(0, self.layers)

    def blocks_for(self, tokens: int) -> int:
        """Return how many blocks hold `tokens` tokens."""
        return -(-tokens // self.block_size)

    def describe(self) -> dict[str, int | str]:
        """Return the fields by name, for the compatibility hash and the log."""
        return asdict(self)
