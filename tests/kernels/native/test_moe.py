"""The native parts of a mixture of experts, against torch's."""

from typing import Any

import pytest
import torch

from baton.kernels.linear import Linear
from baton.models.blocks.routing import Router
from baton.models.decoder_spec import RoutingSpec

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
"""In the order of the enum Scoring."""


@pytest.mark.parametrize("spec", ROUTINGS)
@pytest.mark.parametrize("ties", [False, True])
def test_routing(operations: Any, spec: RoutingSpec, ties: bool) -> None:
    """As torch's router, also where many scores are equal."""
    logits = torch.randn(40, spec.experts) * 3
    correction = torch.randn(spec.experts) / 4
    if ties:
        logits, correction = logits.sign() * 20, torch.zeros(spec.experts)
    chosen = torch.empty(40, spec.top_k, dtype=torch.int32)
    weights = torch.empty(40, spec.top_k)
    operations(
        "route",
        2,
        logits=logits,
        logits_stride=spec.experts,
        tokens=40,
        experts=spec.experts,
        top_k=spec.top_k,
        scoring=SCORINGS.index(spec.scoring),
        normalise=spec.normalise,
        scale=spec.scale,
        groups=spec.groups,
        top_groups=spec.top_groups,
        correction=correction if spec.correction else None,
        chosen=chosen,
        weights=weights,
    )
    unit = Linear(torch.eye(spec.experts), None)
    expected, shares = Router(spec, unit, correction if spec.correction else None)(logits)
    torch.testing.assert_close(weights, shares)
    assert torch.equal(chosen.long(), expected)


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("shared", [False, True])
def test_pairs_and_sums(operations: Any, threads: int, shared: bool) -> None:
    """Expert e multiplies by e + 1; the last has nothing to do."""
    tokens, experts, top_k, width = 23, 6, 3, 21
    x, base = torch.randn(tokens, width), torch.randn(tokens, width)
    chosen = torch.stack([torch.randperm(experts - 1)[:top_k] for _ in range(tokens)]).int()
    weights, out = torch.rand(tokens, top_k), torch.empty(tokens, width)
    starts = torch.empty(experts + 1, dtype=torch.int32)
    rows, places = torch.empty(2, tokens * top_k, dtype=torch.int32)
    operations(
        "group_pairs",
        threads,
        chosen=chosen,
        tokens=tokens,
        experts=experts,
        top_k=top_k,
        starts=starts,
        rows=rows,
        places=places,
    )
    counts = chosen.flatten().bincount(minlength=experts)
    assert torch.equal(starts[1:].long(), counts.cumsum(0))
    assert starts[0] == 0
    of_row = torch.arange(experts).repeat_interleave(counts)
    assert torch.equal(of_row[places.long()].int(), chosen.flatten())
    operations(
        "combine",
        threads,
        x=x[rows.long()] * (of_row + 1)[:, None],
        x_stride=width,
        places=places,
        weights=weights,
        top_k=top_k,
        shared=base if shared else None,
        shared_stride=width,
        out=out,
        out_stride=width,
        tokens=tokens,
        width=width,
    )
    expected = x * (weights * (chosen + 1)).sum(-1, keepdim=True) + (base if shared else 0)
    torch.testing.assert_close(out, expected)
