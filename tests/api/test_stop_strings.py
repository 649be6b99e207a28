import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from baton.api.stop_strings import StopStrings


def feed(stop: tuple[str, ...], pieces: list[str]) -> tuple[str, bool]:
    stops = StopStrings(stop)
    shown = ""
    for piece in pieces:
        shown += stops.push(piece)
        if stops.stopped:
            return shown, True
    return shown + stops.flush(), False


def reference(stop: tuple[str, ...], text: str) -> tuple[str, bool]:
    """Character by character: stop at the first end of a stop string, cut the longest."""
    for end in range(1, len(text) + 1):
        found = [s for s in stop if text[:end].endswith(s)]
        if found:
            return text[: end - max(map(len, found))], True
    return text, False


letters = st.text(alphabet="abc", max_size=30)
stops = st.lists(st.text(alphabet="abc", min_size=1, max_size=4), max_size=4).map(tuple)


@settings(deadline=None, max_examples=500)
@given(letters, stops, st.lists(st.integers(0, 30), max_size=10))
def test_any_split_gives_what_one_character_at_a_time_gives(text, stop, cuts):
    bounds = [0, *sorted(min(cut, len(text)) for cut in cuts), len(text)]
    pieces = [text[a:b] for a, b in itertools.pairwise(bounds)]
    assert feed(stop, pieces) == reference(stop, text)


@settings(deadline=None, max_examples=300)
@given(letters, stops)
def test_no_part_of_a_stop_string_is_shown_before_it_is_ruled_out(text, stop):
    scanner = StopStrings(stop)
    shown = ""
    final, _ = reference(stop, text)
    for character in text:
        shown += scanner.push(character)
        assert final.startswith(shown)
        if scanner.stopped:
            break


@pytest.mark.parametrize(
    ("stop", "pieces", "expected"),
    [
        (("\n\n",), ["a\n", "b", "\n", "\nc"], ("a\nb", True)),
        (("STOP",), ["xxST", "OxSTO"], ("xxSTOxSTO", False)),
        (("STOP",), ["STOP"], ("", True)),
        (("aab",), ["aaa", "ab"], ("aa", True)),
        (("bc", "abcd"), ["abcd"], ("a", True)),
        (("c", "abc"), ["xabc"], ("x", True)),
        ((), ["a", "b"], ("ab", False)),
    ],
)
def test_examples(stop, pieces, expected):
    assert feed(stop, pieces) == expected


def test_only_what_may_become_a_stop_string_is_held():
    stops = StopStrings(("\n\n",))
    assert stops.push("one\n") == "one"
    assert stops.push("two") == "\ntwo"
    assert stops.flush() == ""
