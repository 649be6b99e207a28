import codecs
import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from baton.api.detokenize import Detokenizer
from baton.api.text_stream import TextStream
from baton.api.tool_calls import ToolUse, make_parser
from baton.core.request import FinishReason


class Bytes:
    """The hardest byte-level tokenizer: every token is one byte; it counts its work."""

    def __init__(self) -> None:
        self.decoded = 0

    def decode(self, ids) -> str:
        self.decoded += len(ids)
        return bytes(ids).decode(errors="replace")


class StripsLeadingSpace:
    """Like SentencePiece: the space that opens the first token is not text."""

    words = (" the", " cat", "s", "\u00e9")

    def decode(self, ids) -> str:
        return "".join(self.words[i] for i in ids).removeprefix(" ")


def feed(detokenizer: Detokenizer, pieces) -> list[str]:
    return [*(detokenizer.push(piece) for piece in pieces), detokenizer.flush()]


def split(ids, cuts) -> list[list[int]]:
    bounds = [0, *sorted(cut % (len(ids) + 1) for cut in cuts), len(ids)]
    return [list(ids[a:b]) for a, b in itertools.pairwise(bounds)]


cuts = st.lists(st.integers(0, 500), max_size=40)


@settings(deadline=None, max_examples=300)
@given(st.text(max_size=60), cuts)
def test_any_split_of_valid_text_gives_the_text(text, cuts):
    ids = list(text.encode())
    assert "".join(feed(Detokenizer(Bytes()), split(ids, cuts))) == text


@settings(deadline=None, max_examples=300)
@given(st.binary(max_size=80), cuts)
def test_any_split_of_any_bytes_equals_decoding_at_once(raw, cuts):
    expected = raw.decode(errors="replace")
    assert "".join(feed(Detokenizer(Bytes()), split(raw, cuts))) == expected


@settings(deadline=None, max_examples=100)
@given(st.lists(st.integers(0, 3999), max_size=60), cuts)
def test_any_split_of_random_tokens_of_a_real_tokenizer(tokenizer, ids, cuts):
    assert "".join(feed(Detokenizer(tokenizer), split(ids, cuts))) == tokenizer.decode(ids)


@pytest.mark.parametrize(
    "text", ["def f(x):\n    return '\u00e9\u4e2d\U0001f600'", "\ufffd", "a\ufffd\ufffdb"]
)
def test_one_token_at_a_time_of_a_real_tokenizer(tokenizer, text):
    ids = tokenizer.encode(text)
    assert "".join(feed(Detokenizer(tokenizer), [[i] for i in ids])) == text


def test_a_character_is_never_split_and_never_late():
    detokenizer = Detokenizer(Bytes())
    shown = [detokenizer.push([byte]) for byte in "a\u00e9\u4e2d\U0001f600b".encode()]
    assert shown == ["a", "", "\u00e9", "", "", "\u4e2d", "", "", "", "\U0001f600", "b"]
    assert detokenizer.flush() == ""


@settings(deadline=None, max_examples=150)
@given(
    st.text("a\u00e9\u65e5\U0001f600\U0001f468\u200d<{\n", max_size=30),
    st.sampled_from([(), ("\U0001f468",), ("\u65e5a", "<<")]),
    cuts,
)
def test_no_piece_of_a_stream_has_half_a_character(text, stop, cuts):
    """One token a byte, and all that holds text back on its way: stop strings, and tool calls."""
    stream = TextStream(Detokenizer(Bytes()), stop=stop, stop_token_ids=())
    tools = make_parser(ToolUse("hermes"))
    shown = ""
    for tokens in split(list(text.encode()), cuts):
        piece = stream.push(tokens)
        told = [event.text for event in tools.push(piece.text)]
        assert not any("\ufffd" in part for part in [piece.text, *told])
        shown += "".join(told)
        if piece.finish is not None:
            break
    else:
        shown += "".join(e.text for e in tools.push(stream.push([], FinishReason.LENGTH).text))
    shown += "".join(event.text for event in tools.finish())
    ends = [text.find(string) for string in stop if string in text]
    assert shown == text[: min(ends)] if ends else shown == text


def test_half_a_character_at_the_end_is_told_by_flush_once():
    detokenizer = Detokenizer(Bytes())
    assert detokenizer.push(list(b"a\xe4\xb8")) == ""
    assert detokenizer.flush() == "a\ufffd"
    assert detokenizer.flush() == ""


@pytest.mark.parametrize("raw", [b"\x80" * 3000, "\u4e2d".encode() * 1000, b"abc " * 750])
def test_cost_per_token_is_constant_whatever_comes(raw):
    decoder = Bytes()
    text = "".join(feed(Detokenizer(decoder), [[byte] for byte in raw]))
    assert text == raw.decode(errors="replace")
    assert decoder.decoded < 160 * len(raw), "quadratic work would be thousands per token"


def test_bytes_that_are_no_character_are_not_held_back_for_ever():
    detokenizer = Detokenizer(Bytes())
    shown = "".join(detokenizer.push([0x80]) for _ in range(100))
    assert len(shown) > 80


def test_words_keep_their_space_after_the_prompt_and_after_each_other():
    decoder = StripsLeadingSpace()
    assert feed(Detokenizer(decoder, prompt=[0]), [[1], [2], [1]]) == [" cat", "s", " cat", ""]
    assert feed(Detokenizer(decoder), [[0], [1]]) == ["the", " cat", ""]


def test_a_prompt_that_ends_in_half_a_character_is_left_alone():
    detokenizer = Detokenizer(Bytes(), prompt=[0xE4])
    assert feed(detokenizer, [[0x41]]) == ["A", ""]


@settings(deadline=None, max_examples=100)
@given(st.binary(max_size=40))
def test_agrees_with_an_incremental_utf8_decoder_on_what_is_complete(raw):
    """Never earlier than certain: what is shown is a prefix of what the standard decoder shows."""
    detokenizer = Detokenizer(Bytes())
    reference = codecs.getincrementaldecoder("utf-8")("replace")
    ours = theirs = ""
    for byte in raw:
        ours += detokenizer.push([byte])
        theirs += reference.decode(bytes([byte]))
        assert theirs.startswith(ours)
