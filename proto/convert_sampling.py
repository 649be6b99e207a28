"""Sampling parameters and logprobs to messages and back."""

from math import isfinite
from typing import Any, cast, get_args

from baton.core.errors import HandoverError, InvalidRequest
from baton.core.grammar import MAX_GRAMMAR_BYTES, Grammar, GrammarKind
from baton.core.request import SamplingParams, TokenLogprobs
from baton.proto import worker_pb2 as pb

_SAME_NAME = (
    "temperature",
    "top_k",
    "top_p",
    "seed",
    "min_p",
    "typical_p",
    "repetition_penalty",
    "presence_penalty",
    "frequency_penalty",
    "min_tokens",
    "logprobs",
)
_GRAMMAR_KINDS = get_args(GrammarKind)


def sampling_fields(sampling: SamplingParams) -> dict[str, Any]:
    """Return the fields of a pb.Request that say how to sample."""
    fields: dict[str, Any] = {name: getattr(sampling, name) for name in _SAME_NAME}
    if sampling.logit_bias:
        biases = [pb.LogitBias(token=token, bias=bias) for token, bias in sampling.logit_bias]
        fields["logit_bias"] = biases
    if sampling.bad_words:
        fields["bad_words"] = [pb.TokenSequence(tokens=word) for word in sampling.bad_words]
    if sampling.grammar is not None:
        grammar = sampling.grammar
        fields["grammar"] = pb.Grammar(kind=grammar.kind, source=grammar.source)
    return fields


def sampling_core(message: pb.Request) -> SamplingParams:
    """Take the sampling parameters off the wire; InvalidRequest if one can mean nothing."""
    sampling = SamplingParams(
        temperature=message.temperature,
        top_k=message.top_k,
        top_p=message.top_p,
        seed=message.seed,
        min_p=message.min_p,
        typical_p=message.typical_p if message.HasField("typical_p") else 1.0,
        repetition_penalty=(
            message.repetition_penalty if message.HasField("repetition_penalty") else 1.0
        ),
        presence_penalty=message.presence_penalty,
        frequency_penalty=message.frequency_penalty,
        logit_bias=tuple((entry.token, entry.bias) for entry in message.logit_bias),
        bad_words=tuple(tuple(word.tokens) for word in message.bad_words),
        min_tokens=message.min_tokens,
        logprobs=message.logprobs if message.HasField("logprobs") else None,
        grammar=_grammar(message.grammar) if message.HasField("grammar") else None,
    )
    _check(sampling)
    return sampling


def _grammar(message: pb.Grammar) -> Grammar:
    if message.kind not in _GRAMMAR_KINDS:
        raise InvalidRequest("grammar.kind", message.kind, f"one of {', '.join(_GRAMMAR_KINDS)}")
    grammar = Grammar(cast(GrammarKind, message.kind), message.source)
    if (size := len(grammar.source.encode())) > MAX_GRAMMAR_BYTES:
        raise InvalidRequest("grammar", f"{size} bytes", f"up to {MAX_GRAMMAR_BYTES} bytes")
    return grammar


def _check(sampling: SamplingParams) -> None:
    """Refuse what would make every probability meaningless."""
    for name in ("top_p", "typical_p"):
        if not 0 < getattr(sampling, name) <= 1:
            raise InvalidRequest(name, getattr(sampling, name), "over 0, up to 1")
    if not 0 <= sampling.min_p <= 1:
        raise InvalidRequest("min_p", sampling.min_p, "0 to 1")
    if not 0 < sampling.repetition_penalty < float("inf"):
        raise InvalidRequest("repetition_penalty", sampling.repetition_penalty, "over 0")
    for name in ("presence_penalty", "frequency_penalty"):
        if not isfinite(getattr(sampling, name)):
            raise InvalidRequest(name, getattr(sampling, name), "a finite number")
    if not all(isfinite(bias) for _, bias in sampling.logit_bias):
        raise InvalidRequest("logit_bias", sampling.logit_bias, "finite numbers")
    if not all(sampling.bad_words):
        raise InvalidRequest("bad_words", sampling.bad_words, "at least one token in each")


def logprobs_proto(logprobs: TokenLogprobs) -> pb.TokenLogprobs:
    """Put a token's logprobs on the wire."""
    return pb.TokenLogprobs(
        logprob=logprobs.logprob,
        top_tokens=[token for token, _ in logprobs.top],
        top_logprobs=[logprob for _, logprob in logprobs.top],
    )


def logprobs_core(message: pb.TokenLogprobs) -> TokenLogprobs:
    """Take a token's logprobs off the wire; HandoverError if malformed."""
    if len(message.top_tokens) != len(message.top_logprobs):
        raise HandoverError(
            f"malformed message: TokenLogprobs: {len(message.top_tokens)} tokens with "
            f"{len(message.top_logprobs)} logprobs"
        )
    top = tuple(zip(message.top_tokens, message.top_logprobs, strict=True))
    return TokenLogprobs(message.logprob, top)
