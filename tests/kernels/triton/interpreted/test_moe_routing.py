import pytest
import torch

from baton.kernels.routing import Routing
from baton.kernels.triton import moe_routing
from baton.kernels.triton.moe_routing import order_by_expert, route
from baton.models.blocks.routing import Router
from baton.models.decoder_spec import RoutingSpec


@pytest.mark.parametrize(
    ("scoring", "normalise", "groups", "corrected", "experts", "top_k"),
    [
        ("softmax", True, 1, False, 8, 2),
        ("softmax", False, 1, False, 60, 6),
        ("top_softmax", False, 1, False, 32, 4),
        ("sigmoid", True, 8, True, 64, 8),
        ("softmax", False, 4, False, 32, 3),
    ],
)
def test_choices_and_weights_are_those_of_the_model(
    scoring, normalise, groups, corrected, experts, top_k
):
    random = torch.Generator().manual_seed(0)
    logits = torch.randn((9, experts), generator=random)
    correction = torch.rand(experts, generator=random) if corrected else None
    top_groups = max(1, groups // 2)
    spec = RoutingSpec(
        experts=experts,
        top_k=top_k,
        scoring=scoring,
        normalise=normalise,
        groups=groups,
        top_groups=top_groups,
        scale=2.5,
    )
    scale = 1.0 if scoring == "top_softmax" else 2.5
    expected = Router(spec, lambda x: x, correction)(logits)
    chosen, weights = route(
        logits, Routing(scoring, top_k, groups, top_groups, normalise, scale), correction
    )
    assert chosen.tolist() == expected[0].tolist()
    assert torch.allclose(weights, expected[1], rtol=1e-5)


@pytest.mark.parametrize(
    ("tokens", "top_k", "experts", "rows"), [(1, 2, 8, 16), (37, 4, 5, 16), (50, 2, 17, 64)]
)
def test_every_slot_is_in_one_tile_of_its_expert(tokens, top_k, experts, rows, monkeypatch):
    monkeypatch.setattr(moe_routing, "_CHUNK", 32)
    random = torch.Generator().manual_seed(1)
    chosen = torch.randint(-1, experts + 1, (tokens, top_k), generator=random, dtype=torch.int32)
    order = order_by_expert(chosen, experts, rows)
    expected = []
    for expert in range(experts):
        own = (chosen.flatten() == expert).nonzero().flatten().tolist()
        expected += [(expert, own[i : i + rows]) for i in range(0, len(own), rows)]
    tiles = order.slots.view(-1, rows).tolist()
    for tile, (expert, own) in enumerate(expected):
        assert order.experts[tile] == expert
        assert tiles[tile] == own + [-1] * (rows - len(own))
    assert order.experts[len(expected) :].eq(-1).all()
