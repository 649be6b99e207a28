"""A model as gateways serve it: its names, its limits, and what is expected of its pools."""

from collections.abc import Iterable
from typing import Annotated, Self

from pydantic import Field, model_validator

from baton.core.config import Config, ToolParser
from baton.core.errors import InvalidConfig

Name = Annotated[str, Field(min_length=1, max_length=256)]


class ModelLimits(Config):
    """What the requests of one model may take; those of a tenant hold too."""

    max_open_requests: int | None = Field(default=None, ge=1, le=1 << 16)
    """Requests at instances at once, per gateway; more wait. None: as the gateway's config says."""
    max_prompt_tokens: int | None = Field(default=None, ge=1)
    """Of one request; None: what fits the model."""
    max_output_tokens: int | None = Field(default=None, ge=1)
    """Of one choice; None: what fits the model."""


class FrontModel(Config):
    """One of the models behind a gateway."""

    name: Name
    """Its instances say that they serve it, and answers name it."""
    aliases: tuple[Name, ...] = ()
    """Other names by which users may ask for it."""
    limits: ModelLimits = ModelLimits()
    """For its requests."""
    tool_parser: ToolParser | None = None
    """How it writes tool calls; None: as the gateway's config says."""
    expects_prefill: bool = False
    """It always has prefill instances: without any, something is wrong."""
    may_be_empty: bool = False
    """It may have no decode instance while there is nothing to do; one comes if requests wait."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        check_names((self,))
        return self

    @property
    def names(self) -> tuple[str, ...]:
        """All names by which users may ask for it, its own first."""
        return self.name, *self.aliases


def check_names(models: Iterable[FrontModel]) -> None:
    """Raise InvalidConfig if a name or alias stands for two models, or twice for one."""
    seen: set[str] = set()
    for model in models:
        for name in model.names:
            if name in seen:
                raise InvalidConfig("aliases", name, "a name that no model has yet")
            seen.add(name)
