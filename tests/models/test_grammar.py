"""What a grammar allows, against all tokens tried one by one; and what is refused."""

import json
from pathlib import Path

import numpy as np
import pytest

from baton.core.errors import InvalidRequest
from baton.core.grammar import MAX_GRAMMAR_BYTES, Grammar, GrammarKind
from baton.models.grammar import GrammarCompiler, Matcher, check_grammar
from baton.models.tokenizer import Tokenizer, load_tokenizer

TEXTS = ["for", "format", "for i in range(9):", "import os\n", "ünïcödé", "日本", '"\\quoted\\"']
OBJECT = '{"type": "object"}'


@pytest.fixture(scope="module")
def tokenizer(demo_model_dir: Path) -> Tokenizer:
    return load_tokenizer(demo_model_dir)


@pytest.fixture(scope="module")
def compiler(tokenizer: Tokenizer) -> GrammarCompiler:
    return GrammarCompiler(tokenizer, 4200)


def allowed(compiler: GrammarCompiler, matcher: Matcher) -> set[int]:
    bits = compiler.masks([matcher])[0].view(np.uint8)
    matcher.expect_sound()
    return set(np.flatnonzero(np.unpackbits(bits, bitorder="little")).tolist())


def whole(compiler: GrammarCompiler, tokenizer: Tokenizer, grammar: Grammar, text: str) -> bool:
    """Return whether a text, in the tokens that the tokenizer cuts it into, is of a grammar."""
    matcher = compiler.matcher(grammar)
    for token in tokenizer.encode(text, add_special_tokens=False):
        if token not in allowed(compiler, matcher):
            return False
        matcher.advance([token])
    return matcher.accepts


def test_masks_are_the_tokens_that_go_on_with_one_of_the_texts(
    compiler: GrammarCompiler, tokenizer: Tokenizer
) -> None:
    """Every token at every place, whatever tokens the text before was cut into.

    Where only one byte can come next, the library may ask for the token by which the tokenizer
    itself would go on.
    """
    written = [text.encode() for text in TEXTS]
    tokens = {t: tokenizer.token_bytes(t) for t in range(1, tokenizer.vocab_size)}
    for text in written:
        matcher, said = compiler.matcher(Grammar("choice", json.dumps(TEXTS))), b""
        while True:
            left = [other[len(said) :] for other in written if other.startswith(said)]
            expected = {t for t, b in tokens.items() if b and any(o.startswith(b) for o in left)}
            expected |= {0} if b"" in left else set()
            found = allowed(compiler, matcher)
            assert found == expected or (found < expected and len({o[:1] for o in left}) == 1)
            assert found
            assert matcher.accepts == (b"" in left)
            if said == text:
                break
            shortest = min(
                (t for t in found - {0} if text[len(said) :].startswith(tokens[t])),
                key=lambda t: len(tokens[t]),
            )
            matcher.advance([shortest])
            said += tokens[shortest]


@pytest.mark.parametrize(
    ("kind", "source", "right", "wrong"),
    [
        ("json_object", "", ['{"a": [1, null]}', "{}"], ["[1]", '{"a": 01}', '"a"']),
        ("json_schema", '{"type": "integer", "maximum": 50}', ["49", "-3"], ["51", "1.5", '"1"']),
        ("json_schema", '{"enum": ["x", 2]}', ['"x"', "2"], ["x", "3"]),
        ("regex", r"a{2,3}|\d+", ["aa", "777"], ["a", "aaaa", "aa7", "xaa"]),
        ("lark", 'start: "a" start "b" | "c"', ["c", "aacbb"], ["aacb", "cc"]),
        ("choice", '["yes", "no"]', ["yes", "no"], ["yesno", "maybe", "ye"]),
    ],
)
def test_whole_texts_of_every_kind(
    compiler: GrammarCompiler,
    tokenizer: Tokenizer,
    kind: GrammarKind,
    source: str,
    right: list[str],
    wrong: list[str],
) -> None:
    for text in right:
        assert whole(compiler, tokenizer, Grammar(kind, source), text), text
    for text in wrong:
        assert not whole(compiler, tokenizer, Grammar(kind, source), text), text


def test_white_space_in_json_cannot_go_on_for_ever(
    compiler: GrammarCompiler, tokenizer: Tokenizer
) -> None:
    grammar = Grammar("json_object", "")
    assert whole(compiler, tokenizer, grammar, "{" + "\n" * 64 + '"a":1}')
    assert not whole(compiler, tokenizer, grammar, "{" + "\n" * 65 + '"a":1}')


def test_ends_of_a_text_are_no_part_of_it(compiler: GrammarCompiler, tokenizer: Tokenizer) -> None:
    matcher = compiler.matcher(Grammar("choice", '["abc"]'))
    matcher.advance([*tokenizer.encode("abc", add_special_tokens=False), 0, 0])
    assert allowed(compiler, matcher) == {0}


def test_tokens_beyond_the_tokenizers_are_never_allowed(
    compiler: GrammarCompiler, tokenizer: Tokenizer
) -> None:
    found = allowed(compiler, compiler.matcher(Grammar("regex", "(?s:.*)")))
    assert compiler.vocabulary == 4200
    assert max(found) < tokenizer.vocab_size


@pytest.mark.parametrize(
    ("kind", "source", "why"),
    [
        ("json_schema", "{", "EOF"),
        ("json_schema", "true", "object"),
        ("json_schema", '{"type": "strin"}', "strin"),
        ("json_schema", '{"type": "integer", "minimum": 5, "maximum": 3}', "greater"),
        ("json_schema", '{"$ref": "http://127.0.0.1/schema"}', "not fetch"),
        ("json_schema", '{"$ref": "#"}', "NoExtension"),
        ("json_schema", '{"unevaluatedItems": false, "type": "array"}', "unevaluatedItems"),
        ("json_schema", "[" * 5000, "recursion"),
        ("json_schema", '"\ud800"', "surrogates"),
        ("json_schema", OBJECT + " " * MAX_GRAMMAR_BYTES, "bytes"),
        ("regex", "(", "regex"),
        ("regex", r"(a)\1", "backreferences"),
        ("regex", r"[^\s\S]", "NoExtension"),
        ("lark", "start: foo", "foo"),
        ("lark", "start: start", "NoExtension"),
        ("choice", "[]", "choices"),
        ("choice", '["a", ""]', "texts"),
        ("choice", "{}", "texts"),
        ("choice", "[" * 60_000, "recursion"),
    ],
)
def test_what_cannot_be_followed_is_refused_with_the_reason(
    tokenizer: Tokenizer, kind: GrammarKind, source: str, why: str
) -> None:
    with pytest.raises(InvalidRequest, match=why) as caught:
        check_grammar(Grammar(kind, source), tokenizer, field="response_format")
    assert caught.value.field == "response_format"


def test_a_model_that_cannot_end_a_text_follows_no_grammar(demo_model_dir: Path) -> None:
    class Endless:
        eos_token_ids = ()

    with pytest.raises(InvalidRequest, match="cannot end"):
        GrammarCompiler(Endless())  # type: ignore[arg-type]


def test_compiled_grammars_are_kept_within_bounds(tokenizer: Tokenizer) -> None:
    compiler = GrammarCompiler(tokenizer)
    for number in range(100):
        compiler.matcher(Grammar("choice", f'["{number}"]'))
    assert "64 kept" in repr(compiler)
    large = "x" * 60_000
    for number in range(20):
        compiler.matcher(Grammar("lark", f'// {large}\nstart: "{number}"'))
    assert "17 kept" in repr(compiler)


def test_one_output_does_not_move_another(compiler: GrammarCompiler, tokenizer: Tokenizer) -> None:
    grammar = Grammar("regex", "[ab]+c")
    one, two = compiler.matcher(grammar), compiler.matcher(grammar)
    before = allowed(compiler, two)
    one.advance(tokenizer.encode("abc", add_special_tokens=False))
    assert one.accepts
    assert allowed(compiler, two) == before
