"""Logits beside transformers', token by token: every one fed what the text says, not what it chose.

The same random weights, drawn on the device, go to three models: transformers in float32, which is
the reference, transformers in the dtype that is served, and Baton. How far the second is from the
first is what rounding costs; Baton should not be farther. A text is computed in two chunks and
then by single tokens, so that every way through attention is taken.
"""

from functools import partial
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from baton.kernels.kv_pool import PagedLayer, paged_layers
from baton.models.decoder import Decoder
from bench.gpu.baton_model import BLOCK_SIZE, Piece, decoder, device_step
from bench.gpu.drawn import config_of, draw
from bench.gpu.hf_model import hf_model
from bench.gpu.stage_run import StageRun

DECODED = 8
"""Tokens at a text's end that are computed one by one."""
_FLOAT32 = 2e-5
"""Rounding of float32 over a model's depth."""
MOST = 1.5
"""How many times as far from the reference as transformers Baton may be."""


def run(stage: StageRun) -> None:
    """Compare at every size."""
    scale = stage.scale
    names = {f"{count} x {tokens} tokens": (count, tokens) for count, tokens in scale.checked}
    if stage.known(*names):
        return
    config = config_of(scale.shape, scale.check_layers)
    weights = draw(config, stage.device, stage.dtype)
    own = decoder(config, weights)
    exact = hf_model(config, weights, torch.float32, stage.device)
    rounded = hf_model(config, weights, stage.dtype, stage.device)
    for name, (count, tokens) in names.items():
        stage.case(name, partial(_compare, stage, own, exact, rounded, count, tokens))


def _compare(
    stage: StageRun, own: Decoder, exact: Any, rounded: Any, count: int, tokens: int
) -> dict[str, Any]:
    """Raise AssertionError if Baton is farther from the reference than rounding explains."""
    random = torch.Generator().manual_seed(tokens)
    texts = torch.randint(stage.scale.shape.vocabulary, (count, tokens), generator=random)
    with torch.inference_mode():
        expected = exact(texts.to(stage.device)).logits.float()
        peer = rounded(texts.to(stage.device)).logits.float()
    found = teacher_forced(own, texts, stage.device)
    error, peer_error = distance(found, expected), distance(peer, expected)
    bound = MOST * max(peer_error, _FLOAT32)
    assert error <= bound, f"error {error:.2e}, transformers' own {peer_error:.2e}"
    same = (found.argmax(-1) == expected.argmax(-1)).double().mean()
    return {
        "layers": own.spec.layers,
        "error": error,
        "peer_error": peer_error,
        "same_best": float(same),
        "peer_same_best": float((peer.argmax(-1) == expected.argmax(-1)).double().mean()),
        "tokens": count * tokens,
    }


def teacher_forced(model: Decoder, texts: Tensor, device: torch.device) -> Tensor:
    """Return Baton's logits [texts, tokens, vocabulary] of texts [texts, tokens]."""
    count, tokens = texts.shape
    each = -(-tokens // BLOCK_SIZE)
    order = torch.randperm(count * each, generator=torch.Generator().manual_seed(0))
    tables = order.view(count, each).tolist()
    pool = _pool(model, count * each, device)
    head = tokens - DECODED
    cuts = [0, head // 2 + 1, head, *range(head + 1, tokens + 1)]
    parts = []
    for begin, end in pairwise(cuts):
        pieces = [
            Piece(text[begin:end].tolist(), begin, table)
            for text, table in zip(texts, tables, strict=True)
        ]
        logits = model.forward_device(device_step(pieces, device), pool)
        parts.append(logits.view(count, end - begin, -1))
    return torch.cat(parts, dim=1)


def _pool(model: Decoder, blocks: int, device: torch.device) -> tuple[PagedLayer, ...]:
    """Return a pool of NaN: what no token has written must not be seen."""
    layout = model.spec.kv_layout(BLOCK_SIZE, model.dtype)
    dtype: torch.dtype = getattr(torch, model.dtype)
    return paged_layers(torch.full(layout.shape(blocks), float("nan"), dtype=dtype, device=device))


def distance(found: Tensor, expected: Tensor) -> float:
    """Return |found - expected| / |expected|; NaN where anything is NaN."""
    return float((found.double() - expected.double()).norm() / expected.double().norm())
