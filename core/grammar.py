"""What the text of an answer must match; kept word for word until it is compiled."""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, slots=True)
class Grammar:
    """A constraint on the whole output of one request; its size is checked in api/, once."""

    kind: Literal["json_schema", "json_object", "regex", "lark", "choice"]
    source: str
    """The schema as JSON; "" of `json_object`; the expression; the grammar in Lark's notation; the
    strings to choose from as a JSON list."""
