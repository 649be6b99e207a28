import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from baton.api.detokenize import Detokenizer
from baton.api.text_stream import Piece, TextStream
from baton.core.request import FinishReason

TEXT = "def f():\n    return 'h\u00e9llo \U0001f600 world'\n\nclass A:\n    pass\n"


@pytest.fixture
def make_stream(tokenizer):
    def make(stop=(), stop_token_ids=()):
        return TextStream(Detokenizer(tokenizer), stop=stop, stop_token_ids=stop_token_ids)

    return make


def pieces_of(stream: TextStream, batches) -> list[Piece]:
    pieces = []
    for index, batch in enumerate(batches):
        finish = FinishReason.LENGTH if index == len(batches) - 1 else None
        pieces.append(stream.push(batch, finish))
        if pieces[-1].finish:
            break
    return pieces


@settings(deadline=None, max_examples=60)
@given(size=st.integers(1, 9), stop=st.sampled_from(["\n\n", "return 'h", "\U0001f600 w", "zzz"]))
def test_text_and_token_count_do_not_depend_on_how_tokens_are_batched(tokenizer, size, stop):
    ids = tokenizer.encode(TEXT)

    def run(size):
        stream = TextStream(Detokenizer(tokenizer), stop=(stop,), stop_token_ids=())
        pieces = pieces_of(stream, [ids[i : i + size] for i in range(0, len(ids), size)])
        return (
            "".join(piece.text for piece in pieces),
            [token for piece in pieces for token in piece.tokens],
            pieces[-1].finish,
        )

    text, tokens, finish = run(size)
    assert (text, tokens, finish) == run(1)
    before, found, _ = TEXT.partition(stop)
    assert text == before
    assert finish is (FinishReason.STOP if found else FinishReason.LENGTH)
    assert stop in tokenizer.decode(tokens) if found else tokens == ids
    assert stop not in tokenizer.decode(tokens[:-1])


def test_the_stop_token_is_counted_and_not_shown(make_stream, tokenizer):
    letter = tokenizer.encode("A")[0]
    stream = make_stream(stop_token_ids=(letter,))
    first = stream.push(tokenizer.encode("x"))
    last = stream.push([letter], FinishReason.STOP)
    assert (first.text, last.text) == ("x", "")
    assert last.tokens == (letter,)
    assert last.finish is FinishReason.STOP


def test_what_was_held_back_is_flushed_at_the_end(make_stream, tokenizer):
    stream = make_stream(stop=("ENDING",))
    assert stream.push(tokenizer.encode("the END")).text in ("the ", "the")
    assert stream.push([], FinishReason.LENGTH).text.endswith("END")


def test_an_end_without_tokens_is_a_piece(make_stream):
    assert make_stream().push([], FinishReason.LENGTH) == Piece("", (), FinishReason.LENGTH)


def test_a_stop_string_counts_only_after_min_tokens(tokenizer):
    ids = tokenizer.encode("a b a b a b")
    for least in range(len(ids) + 1):
        stream = TextStream(
            Detokenizer(tokenizer), stop=("b",), stop_token_ids=(), min_tokens=least
        )
        pieces = pieces_of(stream, [[id_] for id_ in ids])
        tokens = [token for piece in pieces for token in piece.tokens]
        text = "".join(piece.text for piece in pieces)
        free, rest = tokenizer.decode(ids[:least]), tokenizer.decode(ids[least:])
        assert text == free + rest.partition("b")[0]
        assert pieces[-1].finish is (FinishReason.STOP if "b" in rest else FinishReason.LENGTH)
        assert len(tokens) >= least
