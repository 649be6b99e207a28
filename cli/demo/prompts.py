"""What the demo asks: the starts of Python functions, one of them after a long file."""

import textwrap
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

LONG_TOKENS = 1_200
"""At least as many tokens of context has the long prompt, so that it takes several chunks."""

_IS_PRIME = '''def is_prime(number):
    """Return True if number is a prime."""
'''
_READ_LINES = '''import os

def read_lines(path, encoding="utf-8"):
    """Return the lines of a file, without comments and blank lines."""
    result = []
'''
_QUEUE = '''class Queue:
    """A queue that blocks when it is full."""

    def __init__(self, maxsize=0):
        self.maxsize = maxsize
        self.items = []

    def put(self, item, block=True, timeout=None):
'''
_SHORTEN = '''

def shorten_all(texts, width, placeholder="[...]"):
    """Shorten each text to fit in the given width."""
'''
_PARSE = '''def parse_date(text):
    """Parse a date of the form YYYY-MM-DD and return (year, month, day)."""
    try:
'''


@dataclass(frozen=True, slots=True)
class Prompt:
    """One request of the demo."""

    title: str
    text: str
    shown: str
    """The end of the text, enough to recognise it."""
    max_tokens: int
    by_grpc: bool = False


def demo_prompts(count_tokens: Callable[[str], int]) -> tuple[Prompt, ...]:
    """Return the requests in the order in which they are sent; the long one is the fourth."""
    long = _long_context(count_tokens) + _SHORTEN
    return (
        Prompt("a function", _IS_PRIME, _IS_PRIME, 96),
        Prompt("a file reader", _READ_LINES, _READ_LINES, 96),
        Prompt("a method", _QUEUE, _QUEUE, 96),
        Prompt("a long file, then a function", long, _SHORTEN.lstrip(), 64),
        Prompt("a parser", _PARSE, _PARSE, 64, by_grpc=True),
    )


def _long_context(count_tokens: Callable[[str], int]) -> str:
    """Return the start of a file of Python's library, of LONG_TOKENS tokens or a little more."""
    taken: list[str] = []
    for line in Path(textwrap.__file__).read_text().splitlines(keepends=True):
        taken.append(line)
        # Counting is cheap, but not so cheap that each of hundreds of lines needs it.
        if len(taken) % 10 == 0 and count_tokens("".join(taken)) >= LONG_TOKENS:
            break
    return "".join(taken).rstrip()
