"""KV layouts to messages and back; a layout that no instance can have is refused."""

from baton.core.errors import HandoverError, InvalidConfig, show
from baton.core.kv_layout import KVLayout
from baton.core.sharded_layout import ShardedLayout
from baton.proto import worker_pb2 as pb

MOST = 1 << 12
"""Of layers, heads, tokens, dimensions and ranks: far more than any model has."""
_SIZES = ("layers", "kv_heads", "block_size", "head_dim", "parts", "tp")


def layout_proto(layout: ShardedLayout) -> pb.ShardedLayout:
    """Put a layout on the wire."""
    model = layout.model
    return pb.ShardedLayout(
        layers=model.layers,
        kv_heads=model.kv_heads,
        block_size=model.block_size,
        head_dim=model.head_dim,
        dtype=model.dtype,
        parts=model.parts,
        tp=layout.tp,
        stages=layout.stages,
    )


def layout_core(field: str, message: pb.ShardedLayout) -> ShardedLayout:
    """Take a layout off the wire; HandoverError, naming `field`, if it is none."""
    for name in _SIZES:
        size = getattr(message, name)
        if not 1 <= size <= MOST:
            raise HandoverError(
                f"malformed message: {field}.{name}: {show(size)}; allowed: 1 to {MOST}"
            )
    try:
        model = KVLayout(
            layers=message.layers,
            kv_heads=message.kv_heads,
            block_size=message.block_size,
            head_dim=message.head_dim,
            dtype=message.dtype,
            parts=message.parts,
        )
        return ShardedLayout(model, message.tp, tuple(message.stages))
    except InvalidConfig as error:
        raise HandoverError(f"malformed message: {field}.{error.message}") from error
