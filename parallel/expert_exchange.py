"""Tokens travel to the ranks that hold their experts, and the answers travel back.

Every (token, choice) is one row. Rows are sorted by the place and the slot that they go to, sent by
one uneven all-to-all, computed slot by slot, and sent back by another: no capacity, no padding and
nothing dropped. A place without tokens takes part with none. In a group of one nothing travels and
the same code computes a mixture of experts on one rank.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from baton.parallel.expert_placement import Placement
from baton.parallel.group import Group

Expert = Callable[[Tensor], Tensor]


class ExpertExchange:
    """One layer's experts, wherever they are."""

    def __init__(
        self,
        ep: Group,
        placement: Placement,
        experts: Sequence[Expert],
        device: str | torch.device = "cpu",
    ) -> None:
        """`experts` are those that `placement` says are at this place, in that order.

        `device` is where tokens and experts are.
        """
        assert len(placement.held) == ep.size, f"{placement} over {ep.size} places"
        assert len(placement.held[ep.rank]) == len(experts)
        self._ep = ep
        self._experts = experts
        self._slots = max(len(held) for held in placement.held)
        places = [placement.places(expert) for expert in range(placement.experts)]
        self._copies = torch.tensor([len(found) for found in places], device=device)
        targets = torch.zeros(len(places), max(map(len, places)), dtype=torch.int64)
        for expert, found in enumerate(places):
            for copy, place in enumerate(found):
                slot = placement.held[place].index(expert)
                targets[expert, copy] = place * self._slots + slot
        self._targets = targets.to(device)
        self.loads = torch.zeros(len(places), dtype=torch.int64, device=device)
        """How often this place's tokens have chosen each expert."""

    def __repr__(self) -> str:
        return f"<ExpertExchange {len(self._experts)} of {len(self._copies)} experts, {self._ep}>"

    def __call__(self, x: Tensor, chosen: Tensor) -> Tensor:
        """Return [tokens, top_k, hidden], what each token's experts answer to x [tokens, hidden].

        `chosen` are the experts [tokens, top_k].
        """
        places, top_k = self._ep.size, chosen.shape[1]
        experts = chosen.flatten()
        self.loads += experts.bincount(minlength=self.loads.shape[0])
        targets = self._spread(experts)
        order = targets.argsort(stable=True)
        counts = targets.bincount(minlength=places * self._slots).view(places, -1)
        arriving = self._ep.all_to_all(counts, [1] * places, [1] * places)
        sent, received = counts.sum(1).tolist(), arriving.sum(1).tolist()
        rows = self._ep.all_to_all(x[order // top_k], sent, received)
        back = self._ep.all_to_all(self._answer(rows, arriving), received, sent)
        found = torch.empty_like(back).index_copy_(0, order, back)
        return found.view(-1, top_k, x.shape[1])

    def _spread(self, experts: Tensor) -> Tensor:
        """Return the slot of each choice, those of one expert by turns over its copies."""
        turns = torch.arange(experts.shape[0], device=experts.device) % self._copies[experts]
        return self._targets[experts, turns]

    def _answer(self, rows: Tensor, counts: Tensor) -> Tensor:
        """Return the experts' answers to rows that lie place by place and slot by slot."""
        sizes = counts.flatten().tolist()
        answers = torch.empty_like(rows)
        asked, told = torch.split(rows, sizes), torch.split(answers, sizes)
        for slot, expert in enumerate(self._experts):
            mine = [i for i in range(slot, len(sizes), self._slots) if sizes[i]]
            if mine:
                rows = asked[mine[0]] if len(mine) == 1 else torch.cat([asked[i] for i in mine])
                parts = torch.split(expert(rows), [sizes[i] for i in mine])
                for i, part in zip(mine, parts, strict=True):
                    told[i].copy_(part)
        return answers
