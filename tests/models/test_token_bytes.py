"""The bytes of the tokens of a text are the text."""

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models

from baton.models.token_bytes import TokenBytes
from baton.models.tokenizer import load_tokenizer

DEMO_MODEL = Path(__file__).resolve().parents[2] / "demo_model" / "main"
TOKENIZER = load_tokenizer(DEMO_MODEL)


@settings(deadline=None)
@given(st.text(max_size=40))
def test_byte_level(text: str) -> None:
    ids = TOKENIZER.encode(text, add_special_tokens=False)
    assert b"".join(TOKENIZER.token_bytes(id_) for id_ in ids) == text.encode()


def test_every_token_of_the_demo_model_has_bytes() -> None:
    found = [TOKENIZER.token_bytes(id_) for id_ in range(TOKENIZER.vocab_size)]
    assert all(found)
    assert {bytes([byte]) for byte in range(256)} - set(found) == set()
    assert found[0] == b"<|endoftext|>"
    assert TOKENIZER.token_bytes(TOKENIZER.vocab_size) == b""


@pytest.mark.parametrize(
    ("written", "expected"),
    [
        ("\u2581the", b" the"),
        ("the", b"the"),
        ("<0xE2>", b"\xe2"),
        ("<0xE2", b"<0xE2"),
        ("\u00e9", "\u00e9".encode()),
    ],
)
def test_sentence_piece(written: str, expected: bytes) -> None:
    backend = Tokenizer(models.BPE({written: 0, "x": 1}, [], byte_fallback=True))
    backend.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    backend.add_special_tokens([AddedToken("</s>")])
    token_bytes = TokenBytes(backend)
    assert token_bytes(0) == expected
    assert token_bytes(2) == b"</s>"
    assert token_bytes(3) == b""
