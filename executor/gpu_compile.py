"""Compiles the kernels of a model's steps while its weights are read.

A second model of the same checkpoint is made on torch's `meta` device, where tensors have shapes
and no memory, and nothing of the files is read. It takes every step that is going to be captured,
and one as large as there may be; what it would launch is compiled.
"""

import os
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from baton.core.config import EngineConfig
from baton.core.kv_layout import KVLayout
from baton.core.log import get_logger
from baton.executor.gpu_model import GpuModel, RaggedStep
from baton.executor.gpu_option_tensors import OptionTensors
from baton.executor.gpu_options import Extent
from baton.executor.gpu_pass import GpuLimits
from baton.executor.gpu_seats import SeatTensors, seats_needed
from baton.executor.gpu_start import Say, graph_sizes, graph_tokens, limits_of
from baton.executor.kv_cache import KVCache
from baton.models.decoder import Decoder
from baton.models.share import Share
from baton.models.spec import ModelSpec
from baton.models.weights import Checkpoint, torch_dtype
from baton.parallel.group import Group, Ranks
from baton.parallel.shape_group import ShapeGroup

_META = torch.device("meta")
_EVERY = 8
"""Kernels after which it is said how many there are."""
_log = get_logger(__name__)


@dataclass(frozen=True, slots=True)
class Wanted:
    """Whose kernels are wanted."""

    model_dir: Path
    spec: ModelSpec
    config: EngineConfig
    share: Share
    layout: KVLayout
    """Of the rank's pool."""
    depth: int
    """Steps that may be under way at once."""


def compile_ahead(wanted: Wanted, say: Say) -> None:
    """Compile what steps of the model launch on the calling thread's current GPU.

    Says how far it is. What goes wrong is logged: kernels are then compiled when they are launched.
    """
    from baton.kernels.triton.ahead import compiling  # without Triton nobody calls this

    began = time.monotonic()
    told = [0, 0]

    def on_compiled(done: int, total: int) -> None:
        told[:] = done, total
        if done % _EVERY == 0:
            say(f"compiled {done} kernels of {total} known so far")

    threads = max(1, (os.cpu_count() or 2) - 1)
    try:
        with compiling(threads, on_compiled):
            take_steps(wanted)
    except Exception as error:  # it was to save time, and is not needed
        _log.warning("kernels.not_compiled_ahead", exc_info=error)
        return
    say(f"compiled {told[0]} kernels in {time.monotonic() - began:.1f} s, beside the weights")


@torch.inference_mode()
def take_steps(wanted: Wanted) -> None:
    """Launch what steps launch, on tensors of shapes alone."""
    config, sizes = wanted.config, graph_sizes(wanted.config)
    skeleton = _skeleton(wanted)
    limits = limits_of(config, skeleton, wanted.depth)
    seats = seats_needed(limits.rows, limits.depth)
    model = GpuModel(
        skeleton,
        KVCache(wanted.layout, 1, "meta"),
        SeatTensors(seats, limits.blocks, _META),
        torch.empty(3, limits.rows, dtype=torch.int64, device=_META),
        OptionTensors(seats, skeleton.spec.vocab_size, _META),
        skip_below=config.attention_skip_below,
    )
    for size in sorted({*sizes, limits.rows}):
        rows = model.decode_logits(size)
        for extent in Extent:
            model.choose(rows, extent)
    for tokens in sorted({*graph_tokens(config), limits.tokens}):
        model.choose(model.ragged_logits(_ragged(tokens, limits), None))


def _skeleton(wanted: Wanted) -> Decoder:
    """Return the rank's share of the model without weights."""
    share = wanted.share
    held = share.ranks
    ranks = Ranks(*map(_absent, (held.pp, held.dp, held.ep, held.cp, held.tp)))
    dtype = wanted.config.dtype
    return Decoder(
        wanted.spec,
        Checkpoint(wanted.model_dir, torch_dtype(dtype), _META),
        dtype=dtype,
        threads=1,
        share=Share(ranks, share.stages, share.placements, share.scatter_from),
    )


def _absent(group: Group) -> ShapeGroup:
    return ShapeGroup(group.rank, group.size)


def _ragged(tokens: int, limits: GpuLimits) -> RaggedStep:
    """Return a step of one decode, if there is room for one, and one chunk."""
    decodes = 1 if tokens > 2 and limits.rows > 1 else 0
    sequences, chunk = decodes + 1, tokens - decodes

    def numbers(count: int) -> Tensor:
        return torch.empty(count, dtype=torch.int64, device=_META)

    return RaggedStep(
        tokens=numbers(tokens),
        positions=numbers(tokens),
        owners=numbers(tokens),
        seats=numbers(sequences),
        lengths=numbers(sequences),
        starts=numbers(2),
        sampled=numbers(sequences),
        decodes=decodes,
        chunks=((chunk, chunk),),
    )
