"""Structured output: what is said is of the grammar, and the same wherever and however it is said.

The reference takes nothing from Baton: transformers' logits, one forward pass for each token, from
which the library's own matcher, fresh for each, strikes out what it does not allow.
"""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jsonschema
import llguidance
import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from baton.core.grammar import Grammar
from baton.core.request import SamplingParams
from baton.core.topology import Role
from baton.models.grammar import check_grammar
from baton.models.tokenizer import load_tokenizer

EOS = (0,)
NEW_TOKENS = 120
SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 8},
        "size": {"type": "integer", "minimum": 0, "maximum": 999},
        "kind": {"enum": ["file", "folder", "löschen"]},
        "tags": {"type": "array", "items": {"type": "boolean"}, "maxItems": 2},
    },
    "required": ["name", "size", "kind", "tags"],
    "additionalProperties": False,
}
CHOICES = ["import sys", "import os.path", "from typing import Any"]
DATE = r"[12][0-9]{3}-(0[1-9]|1[0-2])-[0-3][0-9]( at (noon|midnight))?"
LARK = 'start: "(" NAME ("," " " NAME)~1..3 ")"\nNAME: /[a-z]{1,6}/'
GRAMMARS = {
    "schema": Grammar("json_schema", json.dumps(SCHEMA)),
    "choice": Grammar("choice", json.dumps(CHOICES)),
    "regex": Grammar("regex", DATE),
    "lark": Grammar("lark", LARK),
}


def assert_of(name: str, text: str) -> None:
    """Assert that a whole text is of a grammar, by somebody else's judgement."""
    match name:
        case "schema":
            jsonschema.validate(json.loads(text), SCHEMA)
        case "choice":
            assert text in CHOICES
        case "regex":
            assert re.fullmatch(DATE, text), text
        case "lark":
            assert re.fullmatch(r"\([a-z]{1,6}(, [a-z]{1,6}){1,3}\)", text), text


@pytest.fixture(scope="module")
def prompt(demo_model_dir: Path) -> tuple[int, ...]:
    return tuple(load_tokenizer(demo_model_dir).encode("def read_config(path):\n    return "))


@pytest.fixture(scope="module")
def text_of(demo_model_dir: Path) -> Callable[[list[int]], str]:
    return load_tokenizer(demo_model_dir).decode


Reference = Callable[[str, list[int]], list[int]]


@pytest.fixture(scope="module")
def reference(demo_model_dir: Path, prompt: tuple[int, ...]) -> Reference:
    """Return a function: after each beginning of an output, the likeliest token of those allowed.

    An output that is equal to what it gets from this is the greedy one, token by token.
    """
    model = AutoModelForCausalLM.from_pretrained(demo_model_dir, dtype=torch.float32).eval()
    backend = AutoTokenizer.from_pretrained(demo_model_dir).backend_tokenizer
    library = llguidance.LLTokenizer(backend.to_str(), eos_token=list(EOS))

    def choose(name: str, output: list[int]) -> list[int]:
        source = llguidance.grammar_from(GRAMMARS[name].kind, GRAMMARS[name].source)
        with torch.inference_mode():
            logits = model(torch.tensor([[*prompt, *output]])).logits[0, len(prompt) - 1 :]
        chosen = []
        for i in range(len(output)):
            matcher = llguidance.LLMatcher(library, source)
            assert matcher.consume_tokens(output[:i]), matcher.get_error()
            bits = np.frombuffer(matcher.compute_bitmask(), dtype=np.uint8)
            allowed = np.unpackbits(bits, bitorder="little")[: model.config.vocab_size]
            chosen.append(int(np.where(allowed, logits[i].numpy(), -np.inf).argmax()))
        return chosen

    return choose


def greedy(name: str, **options: Any) -> SamplingParams:
    return SamplingParams(temperature=0.0, grammar=GRAMMARS[name], **options)


def drawn(seed: int, **options: Any) -> SamplingParams:
    grammar = list(GRAMMARS.values())[seed % len(GRAMMARS)]
    return SamplingParams(temperature=1.3, seed=seed, grammar=grammar, **options)


async def test_greedy_tokens_are_those_of_a_naive_reference(
    start_pair: Any,
    tools: Any,
    demo_model_dir: Path,
    prompt: tuple[int, ...],
    reference: Reference,
    text_of: Callable[[list[int]], str],
) -> None:
    pair = await start_pair(demo_model_dir, prefill={"max_batch_tokens": 16})
    prompts = [
        tools.prompt(prompt, NEW_TOKENS, stop=EOS, sampling=greedy(name)) for name in GRAMMARS
    ]
    for ref in ([pair.ref], []):
        answers = await pair.session.run(prompts, ref)
        for name, answer in zip(GRAMMARS, answers, strict=True):
            assert answer.tokens == reference(name, answer.tokens), name
            assert answer.reason == "stop", name
            assert_of(name, text_of(answer.tokens))


OPTIONS: tuple[dict[str, Any], ...] = (
    {"top_p": 0.9},
    {"repetition_penalty": 1.3, "bad_words": ((91, 48), (13,))},
    {"typical_p": 0.9, "logprobs": 2},
    {"min_tokens": 30, "presence_penalty": 0.5},
    {"top_k": 40, "logit_bias": ((3, 5.0), (4, -100.0)), "logprobs": 0},
)


async def test_ahead_preempted_and_drawn_it_is_the_same(
    start_pair: Any,
    tools: Any,
    demo_model_dir: Path,
    prompt: tuple[int, ...],
    text_of: Callable[[list[int]], str],
) -> None:
    """One that computes a step at a time, with room for all, is what the others are held to."""
    samplings = [drawn(seed, **OPTIONS[seed % len(OPTIONS)]) for seed in range(20)]
    prompts = [
        tools.prompt(prompt[: 5 + i % 9], 96, stop=EOS, sampling=sampling)
        for i, sampling in enumerate(samplings)
    ]
    roomy = await start_pair(demo_model_dir)
    expected = await roomy.session.run(prompts, [roomy.ref])
    ended = [i for i, answer in enumerate(expected) if answer.reason == "stop"]
    assert len(ended) > 15, "too few texts are whole: a blind test"
    for i in ended:
        assert_of(list(GRAMMARS)[i % len(GRAMMARS)], text_of(expected[i].tokens))
    crowded = {"kv_memory_mib": 1, "run_ahead": True}
    small = await start_pair(demo_model_dir, prefill={"run_ahead": True}, decode=crowded)
    for ref in ([small.ref], []):
        answers = await small.session.run(prompts, ref)
        assert [a.tokens for a in answers] == [a.tokens for a in expected]
    assert small.decode.stats()["preemptions"] > 0


async def test_an_instance_dies_and_another_goes_on_with_the_same_text(
    start_process: Any,
    tools: Any,
    demo_model_dir: Path,
    prompt: tuple[int, ...],
    reference: Reference,
) -> None:
    """Two processes with a handover; decode is killed in the middle of an object."""
    prefill, one, two = (
        start_process(tools.worker_config(role, name, demo_model_dir))
        for role, name in (
            (Role.PREFILL, "prefill-0"),
            (Role.DECODE, "decode-0"),
            (Role.DECODE, "decode-1"),
        )
    )
    sampling = greedy("schema")
    asked = tools.prompt(prompt, NEW_TOKENS, stop=EOS, sampling=sampling)
    async with tools.open_session(one.info.address) as session:
        answer = await session.submit(asked, [prefill.ref])
        await answer.first.wait()
        one.process.kill()
        seen = list(answer.tokens)
    async with tools.open_session(two.info.address) as session:
        (fresh,) = await session.run([asked], [prefill.ref])
        whole = fresh.tokens
        assert whole == reference("schema", whole)
        assert whole[: len(seen)] == seen
        for cut in sorted({1, len(whole) // 2, len(whole) - 1}):
            rest = tools.prompt(
                prompt, NEW_TOKENS, stop=EOS, sampling=sampling, output=tuple(whole[:cut])
            )
            for ref in ([prefill.ref], []):
                (answer,) = await session.run([rest], ref)
                assert answer.tokens == whole[cut:], cut
    two.close()
    prefill.close()


async def test_what_cannot_be_followed_is_refused_before_anything_is_computed(
    start_pair: Any, tools: Any, demo_model_dir: Path, prompt: tuple[int, ...]
) -> None:
    pair = await start_pair(demo_model_dir)
    bad = Grammar("json_schema", '{"type": "strin"}')
    good = tools.prompt(prompt, 24, stop=EOS, sampling=greedy("choice"))
    answers = await pair.session.run(
        [tools.prompt(prompt, 24, stop=EOS, sampling=SamplingParams(grammar=bad)), good],
        [pair.ref],
    )
    assert answers[0].reason == "error"
    assert answers[0].finish.error.code == "invalid_request"
    assert "strin" in answers[0].finish.error.message
    assert not answers[0].tokens
    assert not answers[0].finish.handovers, "prefill was asked"
    assert answers[1].reason == "stop"


async def test_one_grammar_that_gets_too_large_harms_nobody_else(
    start_pair: Any, tools: Any, demo_model_dir: Path, prompt: tuple[int, ...]
) -> None:
    """Its first tokens are easy; after some more, what may follow takes too much to find out."""
    pair = await start_pair(demo_model_dir, decode={"run_ahead": True})
    heavy = Grammar("regex", "((a{1,1000}){1,1000}){1,1000}")
    check_grammar(heavy, load_tokenizer(demo_model_dir))
    doomed = tools.prompt(prompt, 200, sampling=SamplingParams(grammar=heavy, temperature=0.0))
    good = tools.prompt(prompt, NEW_TOKENS, stop=EOS, sampling=greedy("schema"))
    (alone,) = await pair.session.run([good])
    for ref in ([], [pair.ref]):
        answers = await pair.session.run([good, doomed, good], ref)
        assert answers[1].reason == "error"
        assert answers[1].finish.error.code == "invalid_request"
        assert [a.tokens for a in answers[::2]] == [alone.tokens] * 2
