"""How large everything is: on a GPU, or tiny, to try the harness on a CPU."""

from dataclasses import dataclass, replace

from bench.gpu.floors import LLAMA_8B, ModelShape


@dataclass(frozen=True, slots=True)
class Experts:
    """A layer of experts, as Mixtral 8x7B or one rank of DeepSeek-V3 has it."""

    name: str
    experts: int
    top_k: int
    hidden: int
    intermediate: int


@dataclass(frozen=True, slots=True)
class Latent:
    """Multi-head latent attention."""

    heads: int
    rank: int
    turned: int


@dataclass(frozen=True, slots=True)
class Scale:
    """Sizes of all stages."""

    name: str
    device: str
    dtype: str
    """Of weights, activations and KV, as torch and Baton's configuration spell it."""
    shape: ModelShape
    copy_bytes: int
    """Of one side of the copy: several times the L2 cache."""
    products: tuple[tuple[int, int, int], ...]
    """Sides m, n, k of the products whose best rate is the ceiling."""
    graph_nodes: int
    figure_s: float
    """Seconds that one figure may be repeated for."""
    decode: tuple[tuple[int, int], ...]
    """(batch, context) of each decode case."""
    decode_steps: int
    prefill: tuple[int, ...]
    """Tokens of the prompts."""
    pieces: tuple[int, ...]
    """Tokens of prompts of one chunk that are measured launched, and by captured pieces."""
    chunk_tokens: int
    """Tokens of a step at most."""
    checked: tuple[tuple[int, int], ...]
    """(sequences, tokens) of the texts whose logits are compared with transformers'."""
    check_layers: int
    """Layers of the model that is compared; the rest is as in `shape`."""
    skinny_rows: tuple[int, ...]
    experts: tuple[Experts, ...]
    latent: Latent
    handed_over: tuple[int, int, int]
    """(prompts, tokens each, output tokens) of the handover."""
    peer_static: tuple[tuple[int, int], ...]
    """(batch, context) with transformers' static cache."""
    peer_continuous: tuple[tuple[int, int], ...]
    """(requests, prompt tokens) with transformers' continuous batching."""
    peer_tokens: int
    """Output tokens of each of its requests."""

    @property
    def item(self) -> int:
        """Bytes of a number of the dtype."""
        return {"bfloat16": 2, "float32": 4}[self.dtype]


FULL = Scale(
    name="full",
    device="cuda",
    dtype="bfloat16",
    shape=LLAMA_8B,
    copy_bytes=4 << 30,
    products=((8192, 8192, 8192), (8192, 28672, 4096), (4096, 4096, 14336)),
    graph_nodes=1000,
    figure_s=0.2,
    decode=tuple((batch, context) for context in (1024, 4096) for batch in (1, 32, 128, 256)),
    decode_steps=24,
    prefill=(1024, 2048, 4096, 8192),
    pieces=(128, 512, 1024),
    chunk_tokens=8192,
    checked=((4, 64), (1, 1000)),
    check_layers=32,
    skinny_rows=(1, 16, 64),
    experts=(
        Experts("mixtral", 8, 2, 4096, 14336),
        Experts("deepseek ep8", 32, 8, 7168, 2048),
    ),
    latent=Latent(128, 512, 64),
    handed_over=(8, 4096, 16),
    peer_static=((1, 1024), (32, 1024)),
    peer_continuous=((32, 1024), (128, 1024)),
    peer_tokens=48,
)

SHORT = replace(
    FULL,
    name="short",
    shape=replace(LLAMA_8B, layers=2),
    copy_bytes=1 << 30,
    figure_s=0.05,
    decode=((1, 1024), (32, 1024)),
    decode_steps=8,
    prefill=(1024,),
    pieces=(512,),
    checked=((2, 64),),
    check_layers=2,
    skinny_rows=(16,),
    handed_over=(2, 1024, 8),
    peer_static=(),
    peer_continuous=((4, 256),),
    peer_tokens=8,
)
"""Two layers and the fewest cases, on a GPU: finds what does not run before time is spent."""

TINY = Scale(
    name="tiny",
    device="cpu",
    dtype="float32",
    shape=ModelShape(
        layers=2,
        hidden=64,
        heads=4,
        kv_heads=2,
        head_dim=16,
        intermediate=96,
        vocabulary=256,
    ),
    copy_bytes=1 << 20,
    products=((64, 64, 64),),
    graph_nodes=10,
    figure_s=0.001,
    decode=((1, 20), (3, 40)),
    decode_steps=3,
    prefill=(24, 40),
    pieces=(24,),
    chunk_tokens=32,
    checked=((2, 24), (1, 40)),
    check_layers=2,
    skinny_rows=(1, 3),
    experts=(Experts("tiny", 4, 2, 64, 32),),
    latent=Latent(4, 32, 8),
    handed_over=(2, 40, 4),
    peer_static=((2, 16),),
    peer_continuous=((2, 16),),
    peer_tokens=4,
)

SCALES = {scale.name: scale for scale in (FULL, SHORT, TINY)}
