"""Baton's decoder with drawn weights, on the device, and steps for it."""

import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from baton.kernels.backend import choose_backend, use_backend
from baton.kernels.paged_batch import PagedBatch
from baton.models.blocks.device_step import DeviceStep
from baton.models.decoder import Decoder
from baton.models.spec import ModelSpec, read_spec
from bench.gpu.drawn import DrawnCheckpoint, write_config

BLOCK_SIZE = 16


def spec_of(config: Mapping[str, Any]) -> ModelSpec:
    """Return what Baton reads of a config.json."""
    with tempfile.TemporaryDirectory() as folder:
        write_config(Path(folder), config)
        return read_spec(Path(folder))


def decoder(config: Mapping[str, Any], weights: Mapping[str, Tensor]) -> Decoder:
    """Return a decoder of the weights, computed by whom the device asks for."""
    some = next(iter(weights.values()))
    choice = choose_backend(some.device)
    use_backend(choice.backend)
    return Decoder(
        spec_of(config),
        DrawnCheckpoint(weights),
        dtype=str(some.dtype).removeprefix("torch."),
        threads=torch.get_num_threads(),
        why=choice.why,
    )


class Piece(NamedTuple):
    """New tokens of one sequence: one is a decode, several are a chunk of its prompt."""

    tokens: Sequence[int]
    start: int
    """How many tokens of the sequence are in the pool already."""
    blocks: Sequence[int]


def device_step(pieces: Sequence[Piece], device: torch.device) -> DeviceStep:
    """Return the step of these pieces, decodes first; the logits of all tokens are wanted."""
    decodes = [piece for piece in pieces if len(piece.tokens) == 1]
    chunks = [piece for piece in pieces if len(piece.tokens) > 1]
    assert [*decodes, *chunks] == list(pieces), "decodes come first"
    positions = [p.start + i for p in pieces for i in range(len(p.tokens))]
    blocks = [p.blocks[(p.start + i) // BLOCK_SIZE] for p in pieces for i in range(len(p.tokens))]
    slots = [
        b * BLOCK_SIZE + place % BLOCK_SIZE for b, place in zip(blocks, positions, strict=True)
    ]
    most = max(len(p.blocks) for p in pieces)
    tables = [[*p.blocks, *[p.blocks[-1]] * (most - len(p.blocks))] for p in pieces]
    starts = None
    if chunks:
        ends = torch.tensor([len(chunk.tokens) for chunk in chunks]).cumsum(0)
        starts = torch.cat([torch.zeros(1), ends]).to(device, torch.int32)

    def whole(values: object, dtype: torch.dtype = torch.int64) -> Tensor:
        return torch.tensor(values, dtype=dtype, device=device)

    batch = PagedBatch(
        tables=whole(tables, torch.int32),
        lengths=whole([p.start + len(p.tokens) for p in pieces], torch.int32),
        decodes=len(decodes),
        starts=starts,
        chunks=tuple((len(c.tokens), c.start + len(c.tokens)) for c in chunks),
    )
    tokens = whole([token for piece in pieces for token in piece.tokens])
    return DeviceStep(tokens, whole(positions), whole(slots), batch)
