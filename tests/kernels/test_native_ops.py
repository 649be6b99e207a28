"""The native CPU operations against torch's, and bit for bit against themselves."""

import ctypes
import random
import shutil
import subprocess
from collections.abc import Iterable
from ctypes import c_bool, c_float, c_int32, c_int64, c_void_p
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

import baton
from baton.kernels.clamped_swiglu import clamped_swiglu
from baton.kernels.gelu_mul import gelu_mul
from baton.kernels.linear import Linear
from baton.kernels.rms_norm import rms_norm
from baton.kernels.rope import rope_, rope_angles
from baton.kernels.silu_mul import silu_mul
from baton.models.blocks.routing import Router
from baton.models.decoder_spec import RoutingSpec

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="needs a C++ compiler")

ROOT = Path(baton.__file__).parents[1]
FLAGS = ["-std=c++17", "-O3", "-ffp-contract=fast", "-shared", "-fPIC", "-pthread"]
TARGETS = {"native": ["-march=native"], "avx2": ["-mavx2", "-mfma"], "plain": []}
TILE, TILE_QUERIES, SPAN = 64, 128, 1024


def record(**fields: Any) -> type[ctypes.Structure]:
    """Return a C struct with these fields, in order."""
    return type("Record", (ctypes.Structure,), {"_fields_": list(fields.items())})


SEQUENCE = record(row=c_int32, rows=c_int32, length=c_int32, blocks=c_void_p)
SHAPE = record(
    block_stride=c_int64, parts=c_int32, kv_heads=c_int32, block_size=c_int32, head_dim=c_int32
)
ATTENTION = record(
    sequences=c_void_p,
    count=c_int32,
    heads=c_int32,
    value_dim=c_int32,
    window=c_int32,
    scale=c_float,
    softcap=c_float,
    sinks=c_void_p,
    q=c_void_p,
    q_stride=c_int64,
    pool=c_void_p,
    shape=SHAPE,
    out=c_void_p,
    out_stride=c_int64,
    scratch=c_void_p,
    partials=c_void_p,
    counters=c_void_p,
)
RMS_NORM = record(
    x=c_void_p,
    x_stride=c_int64,
    weight=c_void_p,
    eps=c_float,
    out=c_void_p,
    out_stride=c_int64,
    rows=c_int64,
    width=c_int64,
)
ROPE_TABLE = record(
    positions=c_void_p,
    frequencies=c_void_p,
    magnitude=c_float,
    cos=c_void_p,
    sin=c_void_p,
    tokens=c_int64,
    pairs=c_int64,
)
PLACE_TOKENS = record(
    sequences=c_void_p, count=c_int32, shape=SHAPE, slots=c_void_p, positions=c_void_p
)
PREPARE_HEADS = record(
    heads=c_void_p,
    stride=c_int64,
    tokens=c_int64,
    q_heads=c_int64,
    norm_weights=c_void_p,
    eps=c_float,
    cos=c_void_p,
    sin=c_void_p,
    pairs=c_int64,
    pool=c_void_p,
    shape=SHAPE,
    slots=c_void_p,
)
GATE_MUL = record(
    gate_up=c_void_p,
    gate_up_stride=c_int64,
    out=c_void_p,
    out_stride=c_int64,
    rows=c_int64,
    width=c_int64,
    gate=c_int32,
    alpha=c_float,
    limit=c_float,
)
ADD = record(x=c_void_p, y=c_void_p, count=c_int64)
SOFTCAP = record(x=c_void_p, cap=c_float, count=c_int64)
GATHER = record(
    table=c_void_p,
    table_stride=c_int64,
    index=c_void_p,
    scale=c_float,
    out=c_void_p,
    out_stride=c_int64,
    rows=c_int64,
    width=c_int64,
)
ROUTE = record(
    logits=c_void_p,
    logits_stride=c_int64,
    tokens=c_int64,
    experts=c_int32,
    top_k=c_int32,
    scoring=c_int32,
    normalise=c_bool,
    scale=c_float,
    groups=c_int32,
    top_groups=c_int32,
    correction=c_void_p,
    chosen=c_void_p,
    weights=c_void_p,
)
GROUP_PAIRS = record(
    chosen=c_void_p,
    tokens=c_int64,
    experts=c_int32,
    top_k=c_int32,
    starts=c_void_p,
    rows=c_void_p,
    places=c_void_p,
)
COMBINE = record(
    x=c_void_p,
    x_stride=c_int64,
    places=c_void_p,
    weights=c_void_p,
    top_k=c_int32,
    shared=c_void_p,
    shared_stride=c_int64,
    out=c_void_p,
    out_stride=c_int64,
    tokens=c_int64,
    width=c_int64,
)


@pytest.fixture(scope="module", params=TARGETS)
def operations(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The operations, compiled for this machine, for AVX2 and for any machine of its kind."""
    if request.param == "avx2" and not torch.cpu._is_avx2_supported():
        pytest.skip("no AVX2 here")
    library = tmp_path_factory.mktemp("native") / f"{request.param}.so"
    source = Path(__file__).with_name("native_ops.cpp")
    files = [f"-I{ROOT / 'kernels' / 'native'}", str(source), "-o", str(library)]
    subprocess.run(["g++", *FLAGS, *TARGETS[request.param], *files], check=True, timeout=100)
    found = ctypes.CDLL(str(library))
    found.test_attention_scratch.restype = found.test_attention_partials.restype = c_int64
    return found


# ---- Attention


@dataclass
class How:
    """What attention is like, whatever the batch."""

    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 32
    value_dim: int = 0
    """0: head_dim."""
    parts: int = 2
    block_size: int = 16
    window: int = 0
    softcap: float = 0.0
    sinks: bool = False
    layers: int = 2

    @property
    def values(self) -> int:
        return self.value_dim or self.head_dim


@dataclass
class Row:
    """New tokens of a sequence."""

    rows: int
    length: int
    seed: int = 0
    tensors: dict[str, Tensor] = field(default_factory=dict)


def make_row(how: How, rows: int, length: int, seed: int = 0) -> Row:
    """Return a sequence with noise for its q [rows, ..], k and v [length, ..]."""
    noise = torch.Generator().manual_seed(1000 * length + seed)
    k = torch.randn(length, how.kv_heads, how.head_dim, generator=noise)
    v = torch.randn(length, how.kv_heads, how.head_dim, generator=noise)
    q = torch.randn(length, how.heads, how.head_dim, generator=noise) * 2
    v = k if how.parts == 1 else v
    return Row(rows, length, seed, {"q": q[length - rows :], "k": k, "v": v})


def run(
    operations: Any, how: How, batch: list[Row], *, threads: int, seed: int = 0
) -> list[Tensor]:
    """Return each sequence's output [rows, heads, value_dim]; what nobody sees of the pool is NaN."""
    shuffle = random.Random(seed)
    blocks = sum(-(-row.length // how.block_size) for row in batch) + 3
    free = shuffle.sample(range(blocks), blocks)
    shape = (blocks, how.layers, how.parts, how.kv_heads, how.block_size, how.head_dim)
    pool = torch.full(shape, float("nan"))
    layer, tables, records, start = how.layers - 1, [], [], 0
    for row in batch:
        table = [free.pop() for _ in range(-(-row.length // how.block_size))]
        first = max(0, row.length - row.rows + 1 - how.window) if how.window else 0
        for position in range(first, row.length):
            block, offset = table[position // how.block_size], position % how.block_size
            pool[block, layer, 0, :, offset] = row.tensors["k"][position]
            pool[block, layer, -1, :, offset] = row.tensors["v"][position]
        tables.append(torch.tensor(table, dtype=torch.int32))
        records.append(SEQUENCE(start, row.rows, row.length, tables[-1].data_ptr()))
        start += row.rows
    q = torch.zeros(start, how.heads + 1, how.head_dim)
    q[:, : how.heads] = torch.cat([row.tensors["q"] for row in batch])
    out = torch.full((start, how.heads, how.values), float("nan"))
    sequences = (SEQUENCE * len(records))(*records)
    sinks = torch.linspace(-1, 3, how.heads)
    scratch = torch.full(
        (threads * operations.test_attention_scratch(c_int64(how.head_dim), c_int64(how.values)),),
        float("nan"),
    )
    counters = torch.zeros(len(batch) * how.kv_heads, dtype=torch.int32)
    job = ATTENTION(
        sequences=ctypes.addressof(sequences),
        count=len(records),
        heads=how.heads,
        value_dim=how.values,
        window=how.window,
        scale=how.head_dim**-0.5,
        softcap=how.softcap,
        sinks=sinks.data_ptr() if how.sinks else None,
        q=q.data_ptr(),
        q_stride=q.stride(0),
        pool=pool[0, layer].data_ptr(),
        shape=SHAPE(pool.stride(0), how.parts, how.kv_heads, how.block_size, how.head_dim),
        out=out.data_ptr(),
        out_stride=out.stride(0),
        scratch=scratch.data_ptr(),
        counters=counters.data_ptr(),
    )
    partials = torch.full(
        (operations.test_attention_partials(ctypes.byref(job), threads),), float("nan")
    )
    job.partials = partials.data_ptr()
    operations.test_attend(ctypes.byref(job), threads)
    assert not counters.any()
    return list(out.split([row.rows for row in batch]))


def written_out(how: How, row: Row) -> Tensor:
    """Return attention in float64, with all scores in memory."""
    group = how.heads // how.kv_heads
    k, v = (
        row.tensors[name].double().repeat_interleave(group, dim=1).transpose(0, 1)
        for name in ("k", "v")
    )
    scores = row.tensors["q"].double().transpose(0, 1) @ k.transpose(1, 2) * how.head_dim**-0.5
    if how.softcap:
        scores = how.softcap * torch.tanh(scores / how.softcap)
    position = torch.arange(row.length - row.rows, row.length)[:, None]
    key = torch.arange(row.length)
    hidden = key > position
    if how.window:
        hidden |= key <= position - how.window
    scores = scores.masked_fill(hidden, float("-inf"))
    if how.sinks:
        column = torch.linspace(-1, 3, how.heads).double().view(-1, 1, 1)
        scores = torch.cat([scores, column.expand(-1, row.rows, 1)], dim=-1)
    shares = scores.softmax(-1)[..., : row.length]
    return (shares @ v[..., : how.values]).transpose(0, 1).float()


def check(operations: Any, how: How, sizes: Iterable[tuple[int, int]], threads: int = 1) -> None:
    batch = [make_row(how, *size, seed=seed) for seed, size in enumerate(sizes)]
    for row, found in zip(batch, run(operations, how, batch, threads=threads), strict=True):
        torch.testing.assert_close(found, written_out(how, row), rtol=2e-5, atol=5e-6)


RAGGED = [(1, 1), (1, 64), (1, 65), (5, 5), (70, 130), (1, 200), (3, 127), (129, 129), (2, 63)]


@pytest.mark.parametrize("head_dim", [1, 6, 8, 16, 20, 32, 64, 80, 96, 128, 256])
def test_head_sizes(operations: Any, head_dim: int) -> None:
    check(operations, How(head_dim=head_dim), RAGGED)


@pytest.mark.parametrize(
    ("heads", "kv_heads"), [(1, 1), (3, 3), (4, 1), (7, 1), (10, 2), (16, 1), (24, 3), (130, 1)]
)
def test_groups_of_heads(operations: Any, heads: int, kv_heads: int) -> None:
    check(operations, How(heads=heads, kv_heads=kv_heads), RAGGED, threads=2)


@pytest.mark.parametrize("block_size", [1, 8, 16, 32, 48])
def test_block_sizes(operations: Any, block_size: int) -> None:
    check(operations, How(block_size=block_size), RAGGED)


@pytest.mark.parametrize("window", [1, 5, 63, 64, 65, 100, 5000])
@pytest.mark.parametrize("sinks", [False, True])
def test_windows(operations: Any, window: int, sinks: bool) -> None:
    check(operations, How(window=window, sinks=sinks, block_size=8), RAGGED, threads=2)


def test_softcap_and_sinks(operations: Any) -> None:
    check(operations, How(softcap=2.0), RAGGED)
    check(operations, How(softcap=0.7, sinks=True, window=20), RAGGED)


def test_one_latent_for_all_heads(operations: Any) -> None:
    how = How(heads=128, kv_heads=1, parts=1, head_dim=72, value_dim=56, block_size=32)
    check(operations, how, [(1, 70), (1, 1500), (3, 9)], threads=2)


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_several_spans(operations: Any, threads: int) -> None:
    sizes = [(1, SPAN), (1, 2 * SPAN + 1), (9, SPAN + 4), (1, 3 * SPAN)]
    check(operations, How(), sizes, threads)
    check(operations, How(window=SPAN + 70, sinks=True), sizes, threads)


HOWS = [
    How(head_dim=32),
    How(head_dim=20, heads=6, kv_heads=1, window=150, sinks=True, block_size=8),
    How(head_dim=64, heads=3, kv_heads=3, softcap=5.0),
    How(heads=20, kv_heads=1, parts=1, head_dim=40, value_dim=32),
]


@pytest.mark.parametrize("how", HOWS)
def test_bits_do_not_depend_on_the_batch_or_the_threads(operations: Any, how: How) -> None:
    sizes = [(1, 2 * SPAN + 77), (40, 300), (1, 90), (150, 150), (1, 1)]
    batch = [make_row(how, *size, seed=seed) for seed, size in enumerate(sizes)]
    together = run(operations, how, batch, threads=1)
    for threads in (2, 3):
        for one, other in zip(together, run(operations, how, batch, threads=threads), strict=True):
            assert torch.equal(one, other)
    for row, found in zip(batch, together, strict=True):
        for threads in (1, 2, 5):
            (alone,) = run(operations, how, [row], threads=threads, seed=threads)
            assert torch.equal(alone, found)


@pytest.mark.parametrize("how", HOWS)
@pytest.mark.parametrize("cut", [1, 64, 129, 200])
def test_bits_do_not_depend_on_how_a_prompt_is_cut(operations: Any, how: How, cut: int) -> None:
    """A cut into single rows is what decoding the same tokens would compute."""
    length = 20 if cut == 1 else 331
    past = SPAN - 10
    whole = make_row(how, length, past + length)
    (expected,) = run(operations, how, [whole], threads=1)
    for start in range(0, length, cut):
        end = min(start + cut, length)
        tensors = {name: whole.tensors[name][: past + end] for name in ("k", "v")}
        part = Row(end - start, past + end, 0, tensors | {"q": whole.tensors["q"][start:end]})
        (found,) = run(operations, how, [part], threads=2, seed=start)
        assert torch.equal(found, expected[start:end])


# ---- What is between


def call(operations: Any, name: str, job: ctypes.Structure, threads: int) -> None:
    getattr(operations, f"test_{name}")(ctypes.byref(job), threads)


def test_exponentials(operations: Any) -> None:
    near = torch.linspace(-20, 20, 100_001)
    x = torch.cat([near, near / 100, torch.linspace(-87, 88, 10_000), torch.tensor([0.0])])
    exps, tanhs = torch.empty_like(x), torch.empty_like(x)
    pointers = [c_void_p(t.data_ptr()) for t in (x, exps, tanhs)]
    operations.test_functions(*pointers, c_int64(len(x)))
    for found, exact in ((exps, x.double().exp()), (tanhs, x.double().tanh())):
        unit = torch.nextafter(exact.float().abs(), torch.tensor(float("inf"))).double()
        unit -= exact.float().abs().double()
        assert ((found.double() - exact).abs() / unit).max() <= 2
    assert exps[-1] == 1 and tanhs[-1] == 0
    ends = torch.tensor([float("-inf"), -1e30, -88.0, 89.0, float("inf")])
    pointers = [c_void_p(t.data_ptr()) for t in (ends, exps, tanhs)]
    operations.test_functions(*pointers, c_int64(len(ends)))
    assert exps[:3].tolist() == [0, 0, 0]
    assert tanhs[:5].tolist() == [-1, -1, -1, 1, 1]


@pytest.mark.parametrize("width", [1, 8, 19, 64, 257, 2048])
@pytest.mark.parametrize("threads", [1, 3])
def test_rms_norm(operations: Any, width: int, threads: int) -> None:
    x, weight, out = torch.randn(5, width + 3), torch.randn(width), torch.empty(5, width)
    job = RMS_NORM(
        x.data_ptr(), x.stride(0), weight.data_ptr(), 1e-5, out.data_ptr(), width, 5, width
    )
    call(operations, "rms_norm", job, threads)
    torch.testing.assert_close(out, rms_norm(x[:, :width], weight, 1e-5))


@pytest.mark.parametrize("width", [3, 8, 100, 1000])
@pytest.mark.parametrize("threads", [1, 3])
def test_gates(operations: Any, width: int, threads: int) -> None:
    gate_up = torch.randn(5, 2 * width) * 4
    gate_up[0, 0], gate_up[1, 0], gate_up[0, width] = 200, -200, 50
    expected = [silu_mul(gate_up), gelu_mul(gate_up), clamped_swiglu(gate_up, 1.7, 7.0)]
    for gate, wanted in enumerate(expected):
        out = torch.empty(5, width)
        job = GATE_MUL(
            gate_up.data_ptr(), 2 * width, out.data_ptr(), width, 5, width, gate, 1.7, 7.0
        )
        call(operations, "gate_mul", job, threads)
        torch.testing.assert_close(out, wanted, rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("count", [1, 16, 1001])
@pytest.mark.parametrize("threads", [1, 3])
def test_add_and_softcap(operations: Any, count: int, threads: int) -> None:
    x, y = torch.randn(count) * 40, torch.randn(count)
    expected = torch.tanh((x + y) / 30) * 30
    call(operations, "add", ADD(x.data_ptr(), y.data_ptr(), count), threads)
    call(operations, "softcap", SOFTCAP(x.data_ptr(), 30.0, count), threads)
    torch.testing.assert_close(x, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gather(operations: Any, dtype: torch.dtype) -> None:
    table, index = torch.randn(50, 37).to(dtype), torch.tensor([3, 49, 0, 3], dtype=torch.int32)
    out = torch.empty(4, 37)
    job = GATHER(table.data_ptr(), 37, index.data_ptr(), 3.5, out.data_ptr(), 37, 4, 37)
    name = "gather_floats" if dtype == torch.float32 else "gather_bf16"
    call(operations, name, job, 2)
    assert torch.equal(out, table[index].float() * 3.5)


@pytest.mark.parametrize(("head_dim", "turned"), [(8, 8), (32, 32), (64, 16), (80, 20), (96, 96)])
@pytest.mark.parametrize("normed", [False, True])
@pytest.mark.parametrize("threads", [1, 2])
def test_heads_before_attention(
    operations: Any, head_dim: int, turned: int, normed: bool, threads: int
) -> None:
    """Norm, rotation and the write to the pool, of two sequences."""
    heads, kv_heads, block_size, pairs = 4, 2, 8, turned // 2
    pool = torch.zeros(9, 3, 2, kv_heads, block_size, head_dim)
    tables = [torch.tensor(table, dtype=torch.int32) for table in ([4, 0, 8], [5, 2])]
    spans = [(0, 5, 19), (5, 1, 9)]  # row, rows, length
    sequences = (SEQUENCE * 2)(
        *[SEQUENCE(*s, t.data_ptr()) for s, t in zip(spans, tables, strict=True)]
    )
    shape = SHAPE(pool.stride(0), 2, kv_heads, block_size, head_dim)
    slots, found = torch.empty(6, dtype=torch.int64), torch.empty(6, dtype=torch.int32)
    job = PLACE_TOKENS(ctypes.addressof(sequences), 2, shape, slots.data_ptr(), found.data_ptr())
    call(operations, "place_tokens", job, threads)
    positions = torch.tensor([14, 15, 16, 17, 18, 8])
    assert torch.equal(found.long(), positions)

    frequencies = 10_000.0 ** -(torch.arange(pairs) / pairs)
    cos, sin = torch.empty(6, pairs), torch.empty(6, pairs)
    job = ROPE_TABLE(
        found.data_ptr(), frequencies.data_ptr(), 1.25, cos.data_ptr(), sin.data_ptr(), 6, pairs
    )
    call(operations, "rope_table", job, threads)
    angles = rope_angles(positions, frequencies, torch.float32, 1.25)
    torch.testing.assert_close(cos, angles.cos[:, 0, 0])
    torch.testing.assert_close(sin, angles.sin[:, 0, 1])

    qkv = torch.randn(6, heads + 2 * kv_heads, head_dim)
    weights = torch.randn(heads + kv_heads, head_dim)
    expected = qkv.clone()
    q_and_k = expected[:, : heads + kv_heads]
    if normed:
        q_and_k.copy_(functional.rms_norm(q_and_k, (head_dim,), eps=1e-6) * weights)
    rope_(q_and_k[..., :turned], angles)
    job = PREPARE_HEADS(
        heads=qkv.data_ptr(),
        stride=qkv.stride(0),
        tokens=6,
        q_heads=heads,
        norm_weights=weights.data_ptr() if normed else None,
        eps=1e-6,
        cos=cos.data_ptr(),
        sin=sin.data_ptr(),
        pairs=pairs,
        pool=pool[0, 1].data_ptr(),
        shape=shape,
        slots=slots.data_ptr(),
    )
    call(operations, "prepare_heads", job, threads)
    torch.testing.assert_close(qkv[:, :heads], expected[:, :heads])
    blocks = torch.tensor([0, 0, 8, 8, 8, 2])
    kv = pool[blocks, 1, :, :, positions % block_size]
    torch.testing.assert_close(kv.flatten(1, 2), expected[:, heads:])
    pool[blocks, 1, :, :, positions % block_size] = 0
    assert not pool.any()


# ---- Mixtures of experts

ROUTINGS = [
    RoutingSpec(8, 2),
    RoutingSpec(8, 2, normalise=True),
    RoutingSpec(4, 4, scoring="top_softmax"),
    RoutingSpec(160, 6, groups=8, top_groups=3, scale=16.0),
    RoutingSpec(64, 8, scoring="sigmoid", normalise=True, scale=2.5, correction=True),
    RoutingSpec(
        256,
        8,
        scoring="sigmoid",
        normalise=True,
        scale=2.5,
        groups=8,
        top_groups=4,
        correction=True,
    ),
    RoutingSpec(200, 3, scoring="top_softmax"),
]
SCORINGS = ["softmax", "sigmoid", "top_softmax"]


def route(operations: Any, spec: RoutingSpec, logits: Tensor, correction: Tensor) -> list[Tensor]:
    """Return the chosen experts (int32) and their weights."""
    shape = (logits.shape[0], spec.top_k)
    chosen, weights = torch.empty(shape, dtype=torch.int32), torch.empty(shape)
    job = ROUTE(
        logits=logits.data_ptr(),
        logits_stride=logits.stride(0),
        tokens=logits.shape[0],
        experts=spec.experts,
        top_k=spec.top_k,
        scoring=SCORINGS.index(spec.scoring),
        normalise=spec.normalise,
        scale=spec.scale,
        groups=spec.groups,
        top_groups=spec.top_groups,
        correction=correction.data_ptr() if spec.correction else None,
        chosen=chosen.data_ptr(),
        weights=weights.data_ptr(),
    )
    call(operations, "route", job, 2)
    return [chosen, weights]


@pytest.mark.parametrize("spec", ROUTINGS)
@pytest.mark.parametrize("ties", [False, True])
def test_routing(operations: Any, spec: RoutingSpec, ties: bool) -> None:
    """As torch's router, also where many scores are equal."""
    logits = torch.randn(40, spec.experts) * 3
    correction = torch.randn(spec.experts) / 4
    if ties:
        logits, correction = logits.sign() * 20, torch.zeros(spec.experts)
    unit = Linear(torch.eye(spec.experts), None)
    router = Router(spec, unit, correction if spec.correction else None)
    expected, weights = router(logits)
    chosen, found = route(operations, spec, logits, correction)
    torch.testing.assert_close(found, weights)
    assert torch.equal(chosen.long(), expected)


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("shared", [False, True])
def test_pairs_and_sums(operations: Any, threads: int, shared: bool) -> None:
    """Expert e multiplies by e + 1; one has nothing to do."""
    tokens, experts, top_k, width = 23, 6, 3, 21
    x, base = torch.randn(tokens, width), torch.randn(tokens, width)
    chosen = torch.stack([torch.randperm(experts - 1)[:top_k] for _ in range(tokens)]).int()
    weights, out = torch.rand(tokens, top_k), torch.empty(tokens, width)
    starts = torch.empty(experts + 1, dtype=torch.int32)
    rows, places = torch.empty(2, tokens * top_k, dtype=torch.int32)
    pointers = [t.data_ptr() for t in (starts, rows, places)]
    job = GROUP_PAIRS(chosen.data_ptr(), tokens, experts, top_k, *pointers)
    call(operations, "group_pairs", job, threads)
    counts = chosen.flatten().bincount(minlength=experts)
    assert torch.equal(starts[1:].long(), counts.cumsum(0))
    assert starts[0] == 0
    of_row = torch.arange(experts).repeat_interleave(counts)
    assert torch.equal(of_row[places.long()].int(), chosen.flatten())
    made = x[rows.long()] * (of_row + 1)[:, None]
    job = COMBINE(
        x=made.data_ptr(),
        x_stride=width,
        places=places.data_ptr(),
        weights=weights.data_ptr(),
        top_k=top_k,
        shared=base.data_ptr() if shared else None,
        shared_stride=width,
        out=out.data_ptr(),
        out_stride=width,
        tokens=tokens,
        width=width,
    )
    call(operations, "combine", job, threads)
    expected = x * (weights * (chosen + 1)).sum(-1, keepdim=True) + (base if shared else 0)
    torch.testing.assert_close(out, expected)
