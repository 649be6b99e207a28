"""What a request is once it is valid: token ids and limits. Text stays in api/."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from enum import StrEnum

from baton.core.grammar import Grammar
from baton.core.ids import RequestId

PRIORITY_LEVELS = 10
"""Levels of priority below and above 0."""


class FinishReason(StrEnum):
    """Why a request ended; the words are OpenAI's where OpenAI has one."""

    STOP = "stop"
    """The model sampled a stop token, or the text held a stop string."""
    LENGTH = "length"
    """`max_tokens` were generated."""
    CANCELLED = "cancelled"
    """The caller went away or asked for it."""
    ERROR = "error"
    """It failed; an error says why."""


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How the next token is chosen from the logits; a pure function of these, seed and position.

    Ranges are checked in api/validate.py, once.
    """

    temperature: float = 1.0
    """0 is greedy; otherwise logits are divided by it. From 0 to 2."""
    top_k: int = 0
    """Keep the k likeliest tokens; 0 keeps all."""
    top_p: float = 1.0
    """Keep the smallest set of tokens whose probability reaches p. Over 0, up to 1."""
    seed: int = 0
    """Noise is a pure function of (seed, position). From 0 to 2**63 - 1."""
    min_p: float = 0.0
    """Keep tokens at least so likely as a share of the likeliest; 0 keeps all. From 0 to 1."""
    typical_p: float = 1.0
    """Keep the most typical tokens (information nearest the entropy) whose probability reaches
    this; 1 keeps all. Over 0, up to 1."""
    repetition_penalty: float = 1.0
    """Divides the positive and multiplies the other logits of tokens in prompt or output."""
    presence_penalty: float = 0.0
    """Subtracted from the logits of tokens in the output."""
    frequency_penalty: float = 0.0
    """Subtracted from a token's logit once for each time that it is in the output."""
    logit_bias: tuple[tuple[int, float], ...] = ()
    """(token, what is added to its logit); each token once."""
    bad_words: tuple[tuple[int, ...], ...] = ()
    """Token sequences that never come to stand in the text; none is empty."""
    min_tokens: int = 0
    """Stop tokens are not sampled before so many tokens were generated."""
    logprobs: int | None = None
    """Tell the sampled token's logprob and those of so many likeliest tokens; None: tell none."""
    grammar: Grammar | None = None
    """What the output must look like; None: anything."""

    @property
    def plain(self) -> bool:
        """Whether the logits, these parameters and the position are all that sampling needs."""
        return self == SamplingParams(
            self.temperature,
            self.top_k,
            self.top_p,
            self.seed,
            min_p=self.min_p,
            typical_p=self.typical_p,
        )

    @property
    def penalises(self) -> bool:
        """Whether what was said before changes the logits of single tokens."""
        penalties = (self.repetition_penalty, self.presence_penalty, self.frequency_penalty)
        return penalties != (1.0, 0.0, 0.0)

    @property
    def recalls(self) -> bool:
        """Whether single tokens, wherever they were said, change the logits."""
        return self.penalises or any(len(word) > 1 for word in self.bad_words)

    @property
    def looks_back(self) -> bool:
        """Whether the logits are changed by which tokens came before."""
        return self.recalls or self.grammar is not None


@dataclass(frozen=True, slots=True)
class TokenLogprobs:
    """How likely the model held a token and its rivals.

    Natural logarithms of the model's own distribution: before penalties, bias, temperature and
    truncation.
    """

    logprob: float
    """Of the sampled token."""
    top: tuple[tuple[int, float], ...] = ()
    """(token, logprob) of the likeliest, likeliest first; as many as were asked for."""


@dataclass(frozen=True, slots=True)
class GenerateRequest:
    """A valid request: the proof is that only api/validate.py makes one from user input."""

    request_id: RequestId
    prompt: tuple[int, ...]
    """Token ids, at least one, each below the vocabulary size."""
    max_tokens: int
    """Tokens to generate at most, at least 1; prompt + max_tokens fits the model and the pools."""
    sampling: SamplingParams = field(default_factory=SamplingParams)
    stop_token_ids: tuple[int, ...] = ()
    """Tokens that end the request (the model's EOS tokens, unless the user asked to ignore them).
    The stop token itself is generated and counted, and never shown."""
    tenant: str = ""
    """Requests of different tenants never share cached KV."""
    priority: int = 0
    """Lower is served earlier, from -PRIORITY_LEVELS to PRIORITY_LEVELS, by engines whose policy
    is `priority`."""
    resumed: int = 0
    """The last so many tokens of `prompt` are output: an instance that is gone generated them, and
    they count towards max_tokens, min_tokens and penalties as if they had been generated here. At
    least one token before them is not, and max_tokens is more."""
    traceparent: str = ""
    """The request's span, as W3C Trace Context writes it: whoever works on it names its trace in
    log lines. Empty: it belongs to no trace."""

    @property
    def output_start(self) -> int:
        """The position of the first output token: how long the user's own prompt is."""
        return len(self.prompt) - self.resumed

    def resume(self, output: Sequence[int]) -> "GenerateRequest":
        """Return what is left of this request once `output` was generated, in order."""
        assert not self.resumed, "resumed twice: go on from the first request"
        assert len(output) < self.max_tokens, "nothing is left to generate"
        return replace(self, prompt=(*self.prompt, *output), resumed=len(output))
