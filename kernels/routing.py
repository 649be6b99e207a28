"""How a mixture of experts chooses among them."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Routing:
    """How scores become a choice."""

    scoring: str
    """softmax over all experts, sigmoid of each, or softmax over the chosen (top_softmax)."""
    top_k: int
    groups: int = 1
    top_groups: int = 1
    """A token's experts come from so many of the groups."""
    normalise: bool = False
    """The chosen weights are made to sum to 1."""
    scale: float = 1.0
    """Of the weights, after that."""
