"""What ranks tell each other, as msgpack carries it: results of steps, and errors."""

from typing import Any

from baton.core.errors import BatonError, InternalError, InvalidRequest, all_errors
from baton.core.request import TokenLogprobs
from baton.engine.step import StepResult


def packed_result(result: StepResult) -> list[Any]:
    """Return a step's result as lists and numbers."""
    logprobs = [[seq, told.logprob, told.top] for seq, told in result.logprobs.items()]
    failed = [[seq, why.field, str(why.value), why.allowed] for seq, why in result.failed.items()]
    tokens, unsound = result.tokens, list(result.unsound)
    return [result.step, list(tokens), list(tokens.values()), logprobs, unsound, failed]


def result_from(packed: list[Any]) -> StepResult:
    """Return the result that was packed."""
    step, ids, tokens, logprobs, unsound, failed = packed
    told = {
        seq: TokenLogprobs(logprob, tuple((token, value) for token, value in top))
        for seq, logprob, top in logprobs
    }
    refused = {seq: InvalidRequest(*why) for seq, *why in failed}
    return StepResult(step, dict(zip(ids, tokens, strict=True)), told, tuple(unsound), refused)


def packed_error(error: BaseException) -> list[str]:
    """Return an error's code and message; of a bug, that it is one."""
    if isinstance(error, BatonError):
        return [error.code, str(error)]
    return [InternalError.code, repr(error)]


def error_from(packed: list[str]) -> BatonError:
    """Return the error; an InternalError if its class takes more than a message."""
    code, text = packed
    cls = all_errors().get(code, InternalError)
    try:
        return cls(text)
    except TypeError:
        return InternalError(text)
