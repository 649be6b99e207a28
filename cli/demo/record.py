"""What the demo saw of a request, from outside (its client) and from inside (its trace)."""

from dataclasses import dataclass, field
from typing import Any

from baton.cli.demo.prompts import Prompt


@dataclass(slots=True)
class Record:
    """One request as its client saw it; times are in seconds since the first was sent."""

    prompt: Prompt
    request_id: str = ""
    sent: float = 0.0
    arrivals: list[float] = field(default_factory=list)
    """When each piece of text came."""
    text: str = ""
    trace: dict[str, Any] = field(default_factory=dict)
    """RequestTrace.as_dict() of the gateway, asked for at the end."""

    @property
    def handover(self) -> dict[str, Any]:
        """The attempt that succeeded; empty if the prompt was computed in place."""
        good = [h for h in self.trace["handovers"] if h["outcome"] == "ok"]
        return dict(good[-1]) if good else {}

    @property
    def prompt_tokens(self) -> int:
        return int(self.trace["prompt_tokens"])

    @property
    def output_tokens(self) -> int:
        return int(self.trace["output_tokens"])

    @property
    def compute_begins(self) -> float:
        """When prefill began to compute."""
        return self.sent + float(self.handover.get("queue_s", 0.0))

    @property
    def compute_ends(self) -> float:
        """When prefill had the first token."""
        return self.compute_begins + float(self.handover.get("compute_s", 0.0))
