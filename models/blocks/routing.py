"""Which experts a token visits, and how much each counts."""

from torch import Tensor

from baton.kernels.linear import Linear
from baton.kernels.moe_routing import route
from baton.kernels.routing import Routing
from baton.models.decoder_spec import RoutingSpec


class Router:
    """Scores experts, perhaps limits them to the best groups, and takes the best."""

    def __init__(self, spec: RoutingSpec, scores: Linear, correction: Tensor | None) -> None:
        self._routing = Routing(
            spec.scoring, spec.top_k, spec.groups, spec.top_groups, spec.normalise, spec.scale
        )
        self._scores = scores
        self._correction = correction

    def __call__(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return experts [tokens, top_k] and their weights in float32 for x [tokens, hidden]."""
        return route(self._scores(x), self._routing, self._correction)
