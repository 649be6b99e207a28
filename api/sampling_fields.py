"""How to sample, as users say it: OpenAI's parameters, and vLLM's beside them."""

import secrets
from dataclasses import replace

from baton.api.fields import Fields, check_text, whole
from baton.core.errors import InvalidRequest
from baton.core.grammar import Grammar
from baton.core.hashing import hash_bytes
from baton.core.request import SamplingParams
from baton.models.tokenizer import Tokenizer

MAX_LOGPROBS = 20
MAX_BIASES = 1024
MAX_BAD_WORDS = 128
MAX_BAD_WORD_LENGTH = 256
"""Characters of one bad word."""
MAX_STOP_TOKENS = 128
PENALTY = 2.0
"""Presence and frequency penalties are at most so far from 0."""
LOWEST_REPETITION_PENALTY = 0.01
HIGHEST_REPETITION_PENALTY = 100.0
BIAS = 100.0
"""A bias is at most so far from 0."""


def read_sampling(
    fields: Fields, tokenizer: Tokenizer, logprobs: int | None, grammar: Grammar | None
) -> SamplingParams:
    """Read all that says how to sample, but what each endpoint has in its own way."""
    seed = fields.integer("seed", None, low=0, high=2**63 - 1)
    return SamplingParams(
        temperature=fields.number("temperature", 1.0, low=0, high=2),
        top_k=fields.integer("top_k", 0, low=0, high=tokenizer.vocab_size) or 0,
        top_p=_over_zero(fields, "top_p"),
        seed=secrets.randbits(63) if seed is None else seed,
        min_p=fields.number("min_p", 0.0, low=0, high=1),
        typical_p=_over_zero(fields, "typical_p"),
        repetition_penalty=fields.number(
            "repetition_penalty",
            1.0,
            low=LOWEST_REPETITION_PENALTY,
            high=HIGHEST_REPETITION_PENALTY,
        ),
        presence_penalty=fields.number("presence_penalty", 0.0, low=-PENALTY, high=PENALTY),
        frequency_penalty=fields.number("frequency_penalty", 0.0, low=-PENALTY, high=PENALTY),
        logit_bias=_logit_bias(fields.take("logit_bias"), tokenizer),
        bad_words=_bad_words(fields.take("bad_words"), tokenizer),
        min_tokens=fields.integer("min_tokens", 0, low=0, high=2**31 - 1) or 0,
        logprobs=logprobs,
        grammar=grammar,
    )


def read_stop_tokens(fields: Fields, tokenizer: Tokenizer) -> tuple[int, ...]:
    """Return the tokens that end the request: the user's, and the model's unless told otherwise."""
    eos = () if fields.flag("ignore_eos", False) else tokenizer.eos_token_ids
    value = fields.take("stop_token_ids")
    if value is None:
        return eos
    if not isinstance(value, list) or len(value) > MAX_STOP_TOKENS:
        raise InvalidRequest("stop_token_ids", value, f"a list of at most {MAX_STOP_TOKENS} ids")
    own = [check_token(f"stop_token_ids[{i}]", id_, tokenizer) for i, id_ in enumerate(value)]
    return tuple(dict.fromkeys([*eos, *own]))


def read_completion_logprobs(fields: Fields) -> int | None:
    """Read `logprobs` of a completion: how many, the sampled token's beside them."""
    return fields.integer("logprobs", None, low=0, high=MAX_LOGPROBS)


def read_chat_logprobs(fields: Fields) -> int | None:
    """Read `logprobs` and `top_logprobs` of a chat."""
    wanted = fields.flag("logprobs", False)
    top = fields.integer("top_logprobs", None, low=0, high=MAX_LOGPROBS)
    if top and not wanted:
        raise InvalidRequest("top_logprobs", top, "leave it out unless logprobs is true")
    return (top or 0) if wanted else None


def of_choice(sampling: SamplingParams, choice: int) -> SamplingParams:
    """Return the parameters of one of n choices: each has its own seed, made of the request's.

    The first has the request's own, so that n does not change it.
    """
    if choice == 0:
        return sampling
    parts = sampling.seed.to_bytes(8, "little"), choice.to_bytes(4, "little")
    return replace(sampling, seed=int.from_bytes(hash_bytes(*parts)[:8], "little") >> 1)


def check_token(field: str, value: object, tokenizer: Tokenizer) -> int:
    """Return `value` if it is the id of a token."""
    high = tokenizer.vocab_size - 1
    token = whole(value)
    if token is None or not 0 <= token <= high:
        raise InvalidRequest(field, value, f"a token id from 0 to {high}")
    return token


def _over_zero(fields: Fields, name: str) -> float:
    value = fields.number(name, 1.0, low=0, high=1)
    if value == 0:
        raise InvalidRequest(name, value, "a number over 0, up to 1")
    return value


def _logit_bias(value: object, tokenizer: Tokenizer) -> tuple[tuple[int, float], ...]:
    if value is None:
        return ()
    if not isinstance(value, dict) or len(value) > MAX_BIASES:
        allowed = f"an object of at most {MAX_BIASES} token ids, each with its bias"
        raise InvalidRequest("logit_bias", value, allowed)
    high = tokenizer.vocab_size - 1
    biases = Fields(value, where="logit_bias")
    found = []
    for key in value:
        if not (key.isascii() and key.isdecimal() and len(key) <= len(str(high))):
            raise InvalidRequest("logit_bias", key, f"token ids from 0 to {high} as keys")
        token = check_token("logit_bias", int(key), tokenizer)
        found.append((token, biases.number(key, 0.0, low=-BIAS, high=BIAS)))
    if len({token for token, _ in found}) < len(found):
        raise InvalidRequest("logit_bias", value, "each token id once")
    return tuple((token, bias) for token, bias in found if bias)


def _bad_words(value: object, tokenizer: Tokenizer) -> tuple[tuple[int, ...], ...]:
    """Return the tokens of each word, as it is written at a text's start and after a space."""
    if value is None:
        return ()
    if not isinstance(value, list) or len(value) > MAX_BAD_WORDS:
        raise InvalidRequest("bad_words", value, f"a list of at most {MAX_BAD_WORDS} strings")
    found = []
    for index, word in enumerate(value):
        field = f"bad_words[{index}]"
        if not 1 <= len(check_text(field, word)) <= MAX_BAD_WORD_LENGTH:
            raise InvalidRequest(field, word, f"1 to {MAX_BAD_WORD_LENGTH} characters")
        found += [word, f" {word.lstrip()}"]
    encoded = (tuple(tokenizer.encode(word, add_special_tokens=False)) for word in found)
    return tuple(dict.fromkeys(word for word in encoded if word))
