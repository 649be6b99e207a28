"""When a sequence ends by itself. Stop strings are text, and text stays in api/."""

from baton.core.request import FinishReason, GenerateRequest


def finish_reason(request: GenerateRequest, generated: int, token: int) -> FinishReason | None:
    """Return why the request ends with `token`, its `generated`-th token; None if it goes on."""
    if token in request.stop_token_ids:
        return FinishReason.STOP
    if generated >= request.max_tokens:
        return FinishReason.LENGTH
    return None
