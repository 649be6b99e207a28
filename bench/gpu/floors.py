"""The least bytes and operations that a model's work needs, from its shape alone; no torch.

Decode is bound by memory: a step reads every weight once and every sequence's KV once. Prefill is
bound by arithmetic: a token is multiplied by every weight, and by the keys and values it sees.
What a step reads or writes besides (activations, logits, the new tokens' KV) is left out of the
floor: it counts against the program that is measured.
"""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class ModelShape:
    """The sizes of a dense decoder of Llama's kind, with an output matrix of its own."""

    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    vocabulary: int

    @property
    def qkv_rows(self) -> int:
        """Outputs of the projection to q, k and v side by side."""
        return (self.heads + 2 * self.kv_heads) * self.head_dim

    @property
    def layer_weights(self) -> int:
        """Numbers in the matrices of a layer."""
        attention = self.hidden * (self.qkv_rows + self.heads * self.head_dim)
        return attention + 3 * self.hidden * self.intermediate

    @property
    def head_weights(self) -> int:
        """Numbers in the output matrix."""
        return self.vocabulary * self.hidden


LLAMA_8B = ModelShape(
    layers=32,
    hidden=4096,
    heads=32,
    kv_heads=8,
    head_dim=128,
    intermediate=14336,
    vocabulary=128256,
)
"""The shape of Llama 3 8B."""


@dataclass(frozen=True, slots=True)
class Ceilings:
    """What this machine does at best, as measured."""

    read_bytes_s: float
    """Bytes a second that a kernel reads which does nothing else."""
    flops_s: float
    """Operations a second of a large bfloat16 product; an addition and a product are two."""


@dataclass(frozen=True, slots=True)
class Work:
    """What a piece of work moves and computes at least."""

    bytes: int
    flops: int

    def seconds(self, ceilings: Ceilings) -> float:
        """Return the time under which it cannot be done: memory's or arithmetic's, the longer."""
        return max(self.bytes / ceilings.read_bytes_s, self.flops / ceilings.flops_s)


def weight_bytes(shape: ModelShape, item: int = 2) -> int:
    """Return the bytes of weights that a decode step reads, for `item` bytes a number.

    Of the embedding it reads a row a token, which is nothing beside the rest; norms likewise.
    """
    return item * (shape.layers * shape.layer_weights + shape.head_weights)


def kv_bytes_per_token(shape: ModelShape, item: int = 2) -> int:
    """Return the bytes of KV that one token has in all layers."""
    return item * shape.layers * 2 * shape.kv_heads * shape.head_dim


def decode_step(
    shape: ModelShape, batch: int, context: int, *, weight_item: int = 2, kv_item: int = 2
) -> Work:
    """Return the work of one decode step of `batch` sequences that see `context` tokens each."""
    kv = batch * context * kv_bytes_per_token(shape, kv_item)
    weights = shape.layers * shape.layer_weights + shape.head_weights
    seen = 4 * shape.layers * shape.heads * shape.head_dim * context
    return Work(weight_bytes(shape, weight_item) + kv, batch * (2 * weights + seen))


def decode_attention(shape: ModelShape, batch: int, context: int, item: int = 2) -> Work:
    """Return the work of one layer's attention in a decode step."""
    per_token = 2 * shape.kv_heads * shape.head_dim * item
    flops = 4 * batch * context * shape.heads * shape.head_dim
    return Work(batch * context * per_token, flops)


def prefill_attention(shape: ModelShape, tokens: int, item: int = 2) -> Work:
    """Return the work of one layer's causal attention of a whole prompt: q, K, V and output."""
    pairs = tokens * (tokens + 1) // 2
    moved = tokens * 2 * (shape.heads + shape.kv_heads) * shape.head_dim * item
    return Work(moved, 4 * pairs * shape.heads * shape.head_dim)


def prefill(shape: ModelShape, tokens: int, item: int = 2) -> Work:
    """Return the work of a whole prompt; its last token alone meets the output matrix."""
    matrices = 2 * (tokens * shape.layers * shape.layer_weights + shape.head_weights)
    attention = shape.layers * prefill_attention(shape, tokens, item).flops
    moved = weight_bytes(shape, item) + tokens * kv_bytes_per_token(shape, item)
    return Work(moved, matrices + attention)


def linear(rows: int, outputs: int, inputs: int, weight_bits: int, item: int = 2) -> Work:
    """Return the work of [rows, inputs] times [outputs, inputs] transposed, without bias."""
    moved = outputs * inputs * weight_bits // 8 + item * rows * (inputs + outputs)
    return Work(moved, 2 * rows * outputs * inputs)
