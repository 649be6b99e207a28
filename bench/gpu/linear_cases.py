"""Linear layers, experts, norms, gates and sampling, at the shapes of a model in production."""

from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor

from baton.kernels.routing import Routing
from baton.kernels.triton.add_rms_norm import add_rms_norm_, add_rms_norm_fp8_
from baton.kernels.triton.gate_mul import gate_mul, gate_mul_fp8
from baton.kernels.triton.grouped_linear import grouped_linear, tile_rows
from baton.kernels.triton.moe_routing import order_by_expert, route
from baton.kernels.triton.sampling import SamplingTensors, sample
from baton.kernels.triton.skinny_linear import skinny_linear
from baton.kernels.triton.weight_formats import quantise_float8, quantise_int4, quantise_int8
from bench.gpu import floors
from bench.gpu.clock import Call
from bench.gpu.floors import Work
from bench.gpu.kernel_case import KernelCase, Maker
from bench.gpu.scale import Experts, Scale

Quantise = Callable[[Tensor], tuple[Tensor, Tensor]]
FORMATS: dict[str, tuple[int, Quantise]] = {
    "fp8": (8, quantise_float8),
    "int8": (8, quantise_int8),
    "int4": (4, quantise_int4),
}


def linear_cases(scale: Scale, maker: Maker) -> Iterator[KernelCase]:
    """Yield skinny products beside torch's own, experts, and what stands between layers."""
    shape, item = scale.shape, scale.item
    matrices = {
        "qkv": (shape.qkv_rows, shape.hidden),
        "o": (shape.hidden, shape.heads * shape.head_dim),
        "gate_up": (2 * shape.intermediate, shape.hidden),
        "down": (shape.hidden, shape.intermediate),
        "head": (shape.vocabulary, shape.hidden),
    }
    for name, (outputs, inputs) in matrices.items():
        for rows in scale.skinny_rows:
            sides = (rows, outputs, inputs)
            work = floors.linear(*sides, 8 * item, item)
            title = f"{name} {rows} rows"
            yield KernelCase(f"skinny_linear {title}", work, partial(_skinny, maker, *sides))
            yield KernelCase(f"torch linear {title}", work, partial(_torch, maker, *sides))
    if scale.device != "cpu":  # the interpreter computes with the bits of small formats
        outputs, inputs = matrices["gate_up"]
        for name, (bits, quantise) in FORMATS.items():
            for rows in scale.skinny_rows:
                sides = (rows, outputs, inputs)
                yield KernelCase(
                    f"skinny_linear gate_up {name} {rows} rows",
                    floors.linear(*sides, bits, item),
                    partial(_quantised, maker, *sides, quantise),
                )
    for experts in scale.experts:
        yield from _expert_cases(experts, scale, maker)
    yield from _between_cases(scale, maker)


def _skinny(maker: Maker, rows: int, outputs: int, inputs: int) -> Call:
    x, weight = maker.normal(rows, inputs), maker.normal(outputs, inputs)
    return lambda: skinny_linear(x, weight)


def _torch(maker: Maker, rows: int, outputs: int, inputs: int) -> Call:
    x, weight = maker.normal(rows, inputs), maker.normal(outputs, inputs)
    return lambda: torch.nn.functional.linear(x, weight)


def _quantised(maker: Maker, rows: int, outputs: int, inputs: int, quantise: Quantise) -> Call:
    x = maker.normal(rows, inputs)
    weight, scales = quantise(maker.normal(outputs, inputs))
    return lambda: skinny_linear(x, weight, scales)


def _expert_cases(experts: Experts, scale: Scale, maker: Maker) -> Iterator[KernelCase]:
    """Routing, and the second layer of the experts: its rows are slots, and weighted."""
    item = scale.item
    for tokens in (scale.decode[-1][0], scale.chunk_tokens):
        slots = tokens * experts.top_k
        matrix = experts.hidden * experts.intermediate
        visited = min(experts.experts, slots)
        moved = item * (visited * matrix + slots * (experts.hidden + experts.intermediate))
        yield KernelCase(
            f"grouped_linear {experts.name} {tokens} tokens",
            Work(moved, 2 * slots * matrix),
            partial(_grouped, maker, experts, tokens),
        )
        yield KernelCase(
            f"moe_routing {experts.name} {tokens} tokens",
            Work(4 * tokens * experts.experts, 0),
            partial(_routing, maker, experts, tokens),
            weights=False,
        )


def _grouped(maker: Maker, experts: Experts, tokens: int) -> Call:
    chosen = maker.normal(tokens, experts.experts, dtype=torch.float32)
    chosen = chosen.topk(experts.top_k).indices.to(torch.int32)
    order = order_by_expert(chosen, experts.experts, tile_rows(chosen.numel(), experts.experts))
    weight = maker.normal(experts.experts, experts.hidden, experts.intermediate)
    x = maker.normal(chosen.numel(), experts.intermediate)
    weights = maker.full(1 / experts.top_k, tokens, experts.top_k)
    return lambda: grouped_linear(x, weight, order, weights=weights)


def _routing(maker: Maker, experts: Experts, tokens: int) -> Call:
    logits = maker.normal(tokens, experts.experts, dtype=torch.float32)
    routing = Routing("softmax", experts.top_k, normalise=True)
    rows = tile_rows(tokens * experts.top_k, experts.experts)
    return lambda: order_by_expert(route(logits, routing)[0], experts.experts, rows)


def _between_cases(scale: Scale, maker: Maker) -> Iterator[KernelCase]:
    """What stands between the products; at few rows a launch costs more than its bytes."""
    shape, item = scale.shape, scale.item
    for rows in (scale.decode[-1][0], scale.chunk_tokens):
        one, gates = rows * shape.hidden, rows * shape.intermediate
        both = {
            f"add_rms_norm {rows} rows": (4 * one * item, partial(_norm, maker, scale, rows)),
            f"gate_mul {rows} rows": (3 * gates * item, partial(_gate, maker, scale, rows)),
        }
        if scale.device != "cpu":
            both |= {
                f"add_rms_norm fp8 {rows} rows": (
                    one * (3 * item + 1),
                    partial(_norm, maker, scale, rows, fp8=True),
                ),
                f"gate_mul fp8 {rows} rows": (
                    gates * (2 * item + 1),
                    partial(_gate, maker, scale, rows, fp8=True),
                ),
            }
        for name, (moved, make) in both.items():
            yield KernelCase(name, Work(moved, 0), make, weights=False)
    for kind in ("greedy", "top-k top-p"):
        rows = scale.decode[-1][0]
        yield KernelCase(
            f"sampling {kind} {rows} rows",
            Work(rows * shape.vocabulary * item, 0),
            partial(_sampling, maker, scale, rows, greedy=kind == "greedy"),
            weights=False,
        )


def _norm(maker: Maker, scale: Scale, rows: int, *, fp8: bool = False) -> Call:
    x, stream = maker.normal(rows, scale.shape.hidden), maker.normal(rows, scale.shape.hidden)
    weight = maker.normal(scale.shape.hidden)
    x.mul_(1e-3)  # the stream grows with every repeat, and must stay finite
    kernel: Callable[..., object] = add_rms_norm_fp8_ if fp8 else add_rms_norm_
    return lambda: kernel(x, stream, weight, 1e-5)


def _gate(maker: Maker, scale: Scale, rows: int, *, fp8: bool = False) -> Call:
    gate_up = maker.normal(rows, 2 * scale.shape.intermediate)
    if fp8:
        return lambda: gate_mul_fp8(gate_up, "silu")
    return lambda: gate_mul(gate_up, "silu")


def _sampling(maker: Maker, scale: Scale, rows: int, *, greedy: bool) -> Call:
    logits = maker.normal(rows, scale.shape.vocabulary).mul_(3)
    params = SamplingTensors(
        temperature=maker.full(0.0 if greedy else 0.8, rows),
        top_k=maker.full(0 if greedy else 50, rows, dtype=torch.int32),
        top_p=maker.full(1.0 if greedy else 0.9, rows),
        min_p=maker.full(0.0, rows),
        seeds=maker.whole(1 << 60, rows, dtype=torch.int64),
        positions=maker.whole(1 << 20, rows, dtype=torch.int64),
    )
    return lambda: sample(logits, params)
