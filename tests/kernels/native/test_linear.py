"""Packed linear layers: exact weights, and the same bits for a row in any company."""

import ctypes
from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor

from baton.core.errors import InternalError
from baton.core.kv_layout import KVLayout
from baton.kernels.native.build import FLAGS, NoNativeCode, build
from baton.kernels.native.library import (
    Gate,
    Kind,
    Library,
    Op,
    Rotation,
    SequenceRows,
    StepInput,
    Stored,
)
from baton.kernels.native.program import Program
from baton.models.native_weights import NativeWeights

LAYOUT = KVLayout(1, 1, 16, 8, "float32")
BLOCKS = 64
AVX2 = tuple("-march=haswell" if flag == "-march=native" else flag for flag in FLAGS)
WITHOUT_AMX = (*FLAGS, "-U__AMX_TILE__")

Compute = Callable[..., Tensor]


@pytest.fixture(
    scope="module",
    params=[FLAGS, WITHOUT_AMX, AVX2],
    ids=["this processor", "without AMX", "avx2"],
)
def library(request: pytest.FixtureRequest) -> Library:
    try:
        return Library(str(build(request.param)))
    except NoNativeCode as error:
        pytest.skip(str(error))


class Layer:
    """y = x Wᵀ + b of a table's rows x, perhaps gated, as a program of its own."""

    def __init__(
        self,
        library: Library,
        parts: Sequence[Tensor],
        table: Tensor,
        *,
        bias: Tensor | None = None,
        gate: Gate | None = None,
        threads: int = 1,
        dtype: str = "float32",
    ) -> None:
        weights = NativeWeights(library, dtype=dtype)
        matrix = weights.matrix(parts)
        self.weights = weights
        self.outputs = matrix.outputs // (1 if gate is None else 2)
        self.table = table
        address, stored = weights.table(table)
        width = table.shape[1]
        ops = [
            Op(kind=Kind.EMBED, out=0, width=width, weight=address, stored=stored, scale=1.0),
            Op(kind=Kind.LINEAR, x=0, y=-1, out=-1, matrix=matrix, bias=weights.floats(bias)),
        ]
        if gate is not None:
            ops[1].out = 1
            ops.append(Op(kind=Kind.GATE, x=1, out=-1, width=self.outputs, top_k=1, gate=gate))
        self.ranges = [(number, number + 1) for number in range(len(ops))]
        # The logits are as wide as the vocabulary: here, as there are outputs.
        self.program = Program(
            library,
            (Op * len(ops))(*ops),
            widths=[width, matrix.outputs],
            spreads=[1, 1],
            rotations=(Rotation * 0)(),
            vocabulary=self.outputs,
            pool=(LAYOUT, BLOCKS),
            threads=threads,
        )

    def __call__(self, rows: Sequence[int], *, in_ranges: bool = False) -> Tensor:
        """Return [rows, outputs] for these rows of the table; perhaps operation by operation."""
        out = torch.full((len(rows), self.outputs), float("nan"))
        tokens = (ctypes.c_int32 * len(rows))(*rows)
        blocks = (ctypes.c_int32 * BLOCKS)(*range(BLOCKS))
        sequence = SequenceRows(0, len(rows), len(rows), ctypes.addressof(blocks))
        everything = (ctypes.c_int32 * len(rows))(*range(len(rows)))
        step = StepInput(
            tokens=ctypes.addressof(tokens),
            sequences=ctypes.addressof(sequence),
            sampled=ctypes.addressof(everything),
            logits=out.data_ptr(),
            token_count=len(rows),
            sequence_count=1,
            sampled_count=len(rows),
        )
        for first, last in self.ranges if in_ranges else [(0, None)]:
            self.program.run(step, first, last)
        return out


def random(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("inputs", "outputs"), [(1, 1), (40, 100), (256, 96), (515, 33)])
def test_is_the_product(library: Library, dtype: torch.dtype, inputs: int, outputs: int) -> None:
    weight, bias = random(outputs, inputs, dtype=dtype), random(outputs, seed=1)
    table = random(outputs, inputs, seed=2)
    for count in (1, 2, 3, 5, 12, 13, 31, 100):
        rows = [row % outputs for row in range(count)]
        found = Layer(library, [weight], table, bias=bias)(rows)
        exact = table[rows].double() @ weight.double().T + bias.double()
        torch.testing.assert_close(found.double(), exact, rtol=1e-5, atol=2e-5 * inputs**0.5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("inputs", [96, 700, 6000])
def test_a_row_has_the_same_bits_in_any_company(
    library: Library, dtype: torch.dtype, inputs: int
) -> None:
    """Whatever the number of rows, their tiles and blocks, and the threads."""
    weight, table = random(150, inputs, dtype=dtype), random(150, inputs, seed=1)
    rows = [(7 * row) % 150 for row in range(150)]
    alone, shared = Layer(library, [weight], table), Layer(library, [weight], table, threads=3)
    expected = alone(rows)
    assert torch.equal(shared(rows), expected)
    for count in (1, 2, 3, 4, 6, 7, 11, 13, 24, 25, 53):
        for layer in (alone, shared):
            assert torch.equal(layer(rows[:count]), expected[:count])
    assert torch.equal(alone(rows[100:101]), expected[100:101])


def test_bfloat16_computes_what_its_values_in_float32_compute(library: Library) -> None:
    weight, table = random(70, 130, dtype=torch.bfloat16), random(70, 130, seed=1)
    narrow, wide = Layer(library, [weight], table), Layer(library, [weight.float()], table)
    rows = list(range(20))
    assert torch.equal(narrow(rows), wide(rows))
    assert narrow.weights.nbytes * 2 == wide.weights.nbytes


def test_parts_are_packed_whatever_their_strides(library: Library) -> None:
    """Matrices below each other that end within panels, turned ones, every other row."""
    both = random(80, 64, dtype=torch.bfloat16)
    turned = random(64, 45, dtype=torch.bfloat16, seed=1).T
    parts = [both[:7], turned, both[0::2], both[1::2]]
    table = random(132, 64, seed=2)
    joined = torch.cat(parts)
    assert torch.equal(
        Layer(library, parts, table)(range(30)), Layer(library, [joined], table)(range(30))
    )


def test_every_float16_becomes_the_same_float32(library: Library) -> None:
    """Subnormal numbers, infinities and both zeros too: 1 × each value, as an embedding."""
    bits = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int32).to(torch.int16)
    values = bits.view(torch.float16)
    values = values[~values.isnan()].reshape(-1, 1)
    one = torch.ones(1, 1)
    layer = Layer(library, [one.expand(len(values), 1)], values)
    assert layer.table.dtype == torch.float16
    assert Stored.FLOAT16 == 2
    picked = range(0, len(values), 97)
    found = layer(picked)[:, 0]
    assert torch.equal(found, values[list(picked), 0].float())


def test_a_step_may_run_range_by_range(library: Library) -> None:
    layer = Layer(library, [random(50, 60)], random(50, 60, seed=1), threads=2)
    assert torch.equal(layer(range(9), in_ranges=True), layer(range(9)))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("inputs", [96, 2500])
def test_a_gate_has_the_same_bits_where_its_layer_ends(
    library: Library, dtype: str, inputs: int
) -> None:
    """Of many rows it is computed with the layer, unless they are asked for one by one."""
    weight, table = random(320, inputs), random(160, inputs, seed=1) * inputs**-0.5
    for gate in Gate.SILU, Gate.GELU_TANH:
        layer = Layer(library, [weight], table, gate=gate, threads=2, dtype=dtype)
        expected = layer(range(160), in_ranges=True)
        assert torch.equal(layer(range(160)), expected)
        assert torch.equal(layer(range(9)), expected[:9])


def test_refuses_tokens_and_blocks_that_do_not_exist(library: Library) -> None:
    layer = Layer(library, [random(20, 8)], random(20, 8))
    for token in (-1, 20):
        with pytest.raises(InternalError, match="vocabulary"):
            layer([token])


# ---- Products in bfloat16


def in_pairs(x: Tensor, weight: Tensor) -> Tensor:
    """Return x Wᵀ to the bit, as kernels/native/bfloat16.h defines it.

    A product of two bfloat16 values is exact in float32, so that torch's separate products and sums
    round as multiply-adds do.
    """
    pad = -x.shape[1] % 32
    x, weight = (
        torch.nn.functional.pad(t.bfloat16().float(), (0, pad)).view(len(t), -1, 16, 2)
        for t in (x, weight)
    )
    total = torch.zeros(len(x), len(weight))
    for group in range(x.shape[1]):
        chains = torch.zeros(2, len(x), len(weight))
        for pair in range(16):
            for place in range(2):
                chains[place] += x[:, None, group, pair, place] * weight[:, group, pair, place]
        total += chains[0] + chains[1]
    return total


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("inputs", "outputs"), [(1, 1), (7, 5), (32, 32), (40, 100), (256, 96), (515, 33), (1100, 70)]
)
def test_bfloat16_is_the_product_to_the_bit(
    library: Library, dtype: torch.dtype, inputs: int, outputs: int
) -> None:
    """On every processor, of every number of rows, whatever the weights were stored as."""
    weight, bias = random(outputs, inputs, dtype=dtype), random(outputs, seed=1)
    table = random(outputs, inputs, seed=2)
    rows = [row % outputs for row in range(40)]
    expected = in_pairs(table[rows], weight) + bias
    for threads in (1, 3):
        layer = Layer(library, [weight], table, bias=bias, threads=threads, dtype="bfloat16")
        for count in (*range(1, 9), 12, 13, 16, 17, 31, 32, 33, 40):
            assert torch.equal(layer(rows[:count]), expected[:count]), f"{count} rows"


@pytest.mark.parametrize(("inputs", "rows"), [(4100, 300), (1100, 600), (16500, 20)])
def test_bfloat16_in_many_rows(library: Library, inputs: int, rows: int) -> None:
    """More inputs and more rows than stay in a cache."""
    weight, table = random(70, inputs), random(rows, inputs, seed=1)
    layer = Layer(library, [weight.repeat(9, 1)], table, threads=2, dtype="bfloat16")
    expected = in_pairs(table, weight).repeat(1, 9)
    assert torch.equal(layer(range(rows)), expected)
    assert torch.equal(layer(range(rows - 1, rows)), expected[rows - 1 :])


def test_bfloat16_flushes_what_is_not_normal(library: Library) -> None:
    """Before and after each operation, with tiles and with vectors."""
    weight = torch.full((64, 64), 2.0**-100)
    table = torch.full((64, 64), 2.0**-127)
    table[32:] = 2.0**-27  # products of 2^-127
    table[33, ::2] = 2.0**-20
    layer = Layer(library, [weight], table, dtype="bfloat16")
    expected = torch.zeros(64, 64)
    expected[33] = 32 * 2.0**-120
    assert torch.equal(layer(range(64)), expected)
    for row in (0, 32, 33):
        assert torch.equal(layer([row]), expected[row : row + 1])


def test_bfloat16_parts_are_packed_whatever_their_strides(library: Library) -> None:
    both = random(80, 64, dtype=torch.bfloat16)
    turned = random(64, 45, dtype=torch.bfloat16, seed=1).T
    parts = [both[:7], turned, both[0::2], both[1::2]]
    table = random(132, 64, seed=2)
    layer = Layer(library, parts, table, dtype="bfloat16")
    assert torch.equal(layer(range(30)), in_pairs(table[:30], torch.cat(parts)))
