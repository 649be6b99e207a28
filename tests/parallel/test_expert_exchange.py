"""Every token gets its own experts' answers, wherever they are and however many ask for them."""

from collections.abc import Callable

import torch
from torch import Tensor

from baton.parallel.expert_exchange import ExpertExchange
from baton.parallel.expert_placement import Placement, even_placement
from baton.parallel.group import Ranks
from baton.parallel.mesh import Mesh, Place

from .ranks import RankProcesses

EXPERTS, HIDDEN = 6, 4


def expert(number: int) -> Callable[[Tensor], Tensor]:
    return lambda x: x * (number + 1) + number


def exchange(ranks: Ranks, placement: Placement) -> ExpertExchange:
    held = placement.held[ranks.ep.rank]
    return ExpertExchange(ranks.ep, placement, [expert(number) for number in held])


def check_one(found: ExpertExchange, tokens: int, chosen: Tensor) -> None:
    x = torch.randn(tokens, HIDDEN, generator=torch.Generator().manual_seed(tokens))
    expected = x[:, None] * (chosen[..., None] + 1) + chosen[..., None]
    torch.testing.assert_close(found(x, chosen), expected, rtol=0, atol=0)


def check(ranks: Ranks, place: Place) -> None:
    placements = [
        even_placement(EXPERTS, 2),
        Placement(((0, 1, 2, 3, 4), (5,))),
        Placement(((5, 0, 2), (1, 2, 3, 4, 5, 0))),
    ]
    for placement in placements:
        found = exchange(ranks, placement)
        asked = torch.zeros(EXPERTS, dtype=torch.int64)
        for tokens in ((0, 3), (5, 0), (0, 0), (40, 7)):
            mine = tokens[place.ep]
            chosen = torch.rand(mine, EXPERTS).argsort(1)[:, :2]
            check_one(found, mine, chosen)
            asked += chosen.flatten().bincount(minlength=EXPERTS)
            same = torch.full((mine, 2), 5)  # all tokens want one expert: nothing is dropped
            check_one(found, mine, same)
            asked[5] += 2 * mine
        assert torch.equal(found.loads, asked)


def test_answers_come_back_to_who_asked(processes: RankProcesses) -> None:
    processes.run(Mesh(ep=2), check)


def test_alone_it_is_a_mixture_of_experts() -> None:
    found = exchange(Ranks(), even_placement(EXPERTS, 1))
    check_one(found, 3, torch.tensor([[0, 5], [5, 1], [2, 3]]))
    check_one(found, 0, torch.empty(0, 2, dtype=torch.int64))
    assert found.loads.tolist() == [1, 1, 1, 1, 0, 2]


def count_at_each_place(ranks: Ranks, place: Place) -> int:
    """Place 0 asks the same expert eight times; both places have it."""
    computed = []

    def counting(x: Tensor) -> Tensor:
        computed.append(x.shape[0])
        return x

    found = ExpertExchange(ranks.ep, Placement(((0,), (0,))), [counting])
    asks = 8 if place.ep == 0 else 0
    found(torch.zeros(asks, HIDDEN), torch.zeros(asks, 1, dtype=torch.int64))
    return sum(computed)


def test_copies_of_an_expert_share_its_tokens(processes: RankProcesses) -> None:
    """Turn by turn, and not by which of them is near."""
    assert processes.run(Mesh(ep=2), count_at_each_place) == [4, 4]
