"""Moves experts, between steps, to where the measured loads want them."""

from baton.models.decoder import Decoder
from baton.models.weights import Checkpoint
from baton.parallel.expert_placement import Placement, better_placement, even_placement


class ExpertBalancer:
    """One rank's part of it; every rank of the instance has one, and tells it of every step.

    One layer is looked at every so many steps, each in its turn: what moving its experts costs is
    then the most that any step is held up. All ranks of a stage come to the same placement, since
    they add up their loads first; nobody else needs to know it.
    """

    def __init__(self, model: Decoder, checkpoint: Checkpoint, *, every: int, spare: int) -> None:
        """`every` is in steps; each place has room for `spare` experts beyond an equal share."""
        self._model = model
        self._checkpoint = checkpoint
        self._every = every
        places = model.share.ranks.ep.size
        self._placements: dict[int, Placement] = {}
        self._each: dict[int, int] = {}
        for layer, loads in model.expert_loads.items():
            experts = len(loads)
            self._placements[layer] = even_placement(experts, places)
            self._each[layer] = min(experts, experts // places + spare)
        self.moves = 0
        """Layers whose experts have moved, counted each time."""

    def __repr__(self) -> str:
        return f"<ExpertBalancer of {len(self._placements)} layers, {self.moves} moves>"

    def after(self, step: int) -> None:
        """Look at one layer if it is time; all ranks of the stage have computed step `step`."""
        turn, rest = divmod(step, self._every)
        if rest or not self._placements:
            return
        layer = tuple(self._placements)[turn % len(self._placements)]
        loads, ranks = self._model.expert_loads[layer].clone(), self._model.share.ranks
        # Along tp ranks count the same tokens, or, where rows are scattered, different ones.
        ranks.tp.all_reduce_(ranks.ep.all_reduce_(loads))
        better = better_placement(self._placements[layer], loads.tolist(), self._each[layer])
        if better is not None:
            self._model.place_experts({layer: better}, self._checkpoint)
            self._placements[layer] = better
            self.moves += 1
