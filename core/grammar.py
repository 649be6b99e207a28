"""What the output of a request must look like, as its user has written it down."""

from dataclasses import dataclass
from typing import Literal

GrammarKind = Literal["json_schema", "json_object", "regex", "lark", "choice"]

MAX_GRAMMAR_BYTES = 1 << 16
"""Of one grammar's source, in UTF-8."""


@dataclass(frozen=True, slots=True)
class Grammar:
    """A language of texts: the whole output is one of them, or the beginning of one."""

    kind: GrammarKind
    source: str
    """A JSON schema; nothing (any JSON object will do); a regular expression that the whole text
    matches; a Lark grammar; a JSON list of texts."""
