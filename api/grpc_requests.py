"""Messages of the public gRPC API become calls, and pieces of text become its messages."""

import hashlib

from baton.api.idempotency import MAX_KEY
from baton.api.text_stream import Piece
from baton.api.validate import Call, ServedModel, chat_call, completion_call
from baton.core.errors import InvalidRequest
from baton.core.request import TokenLogprobs
from baton.core.spans import TtftSpans
from baton.proto import inference_pb2 as pb

_OPTIONAL = (
    "max_tokens",
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
    "n",
)


def call_of(request: pb.GenerateRequest, model: ServedModel) -> Call:
    """Return the valid call; raises InvalidRequest in the words of the HTTP API."""
    if request.HasField("timeout_s") and not request.timeout_s > 0:
        raise InvalidRequest("timeout_s", request.timeout_s, "a number over 0, in seconds")
    if len(request.idempotency_key) > MAX_KEY:
        allowed = f"at most {MAX_KEY} characters"
        raise InvalidRequest("idempotency_key", request.idempotency_key, allowed)
    body = _common(request)
    has_logprobs = request.HasField("logprobs")
    if request.WhichOneof("prompt") == "chat":
        body["messages"] = [
            {"role": message.role, "content": message.content} for message in request.chat.messages
        ]
        if has_logprobs:
            body |= {"logprobs": True, "top_logprobs": request.logprobs}
        return chat_call(body, model)
    body["prompt"] = _prompt(request)
    if has_logprobs:
        body["logprobs"] = request.logprobs
    return completion_call(body, model, prefix="gen")


def fingerprint(request: pb.GenerateRequest) -> bytes:
    """Return what tells a request from others that are not just the same."""
    return hashlib.sha256(request.SerializeToString(deterministic=True)).digest()


def _common(request: pb.GenerateRequest) -> dict[str, object]:
    """Return the request as the HTTP API would have it, so that one place checks both."""
    body: dict[str, object] = {
        "model": request.model or None,
        "stop": list(request.stop) or None,
        "ignore_eos": request.ignore_eos,
        "logit_bias": {str(token): bias for token, bias in request.logit_bias.items()},
        "bad_words": list(request.bad_words),
        "stop_token_ids": list(request.stop_token_ids),
        "priority": request.priority or None,
    }
    return body | {name: getattr(request, name) for name in _OPTIONAL if request.HasField(name)}


def _prompt(request: pb.GenerateRequest) -> object:
    match request.WhichOneof("prompt"):
        case "text":
            return request.text
        case "token_ids":
            return list(request.token_ids.ids)
        case _:
            raise InvalidRequest("prompt", None, "text, token_ids or chat")


class Responses:
    """Makes the messages of one call, and counts what they told."""

    def __init__(self, call: Call) -> None:
        self._call = call
        self._output_tokens = [0] * len(call.requests)

    def of(self, index: int, piece: Piece) -> pb.GenerateResponse:
        """Return the message that tells the next piece of a choice."""
        generate = self._call.requests[index].generate
        self._output_tokens[index] += len(piece.tokens)
        response = pb.GenerateResponse(
            request_id=generate.request_id,
            text=piece.text,
            token_ids=piece.tokens,
            index=index,
            logprobs=[_logprobs(told) for told in piece.logprobs],
        )
        if piece.finish is not None:
            response.finish_reason = piece.finish
            response.usage.prompt_tokens = len(generate.prompt)
            response.usage.completion_tokens = self._output_tokens[index]
            response.usage.cached_prompt_tokens = piece.cached_tokens
            if self._call.tell_timing and piece.ttft is not None:
                response.timing.CopyFrom(_timing(piece.ttft))
        return response


def _timing(ttft: TtftSpans) -> pb.Timing:
    spans = [pb.Span(name=name, seconds=seconds) for name, seconds in ttft.items() if seconds > 0]
    return pb.Timing(ttft_s=ttft.total_s, spans=spans)


def _logprobs(told: TokenLogprobs) -> pb.TokenLogprobs:
    top = [pb.TopLogprob(token_id=token, logprob=logprob) for token, logprob in told.top]
    return pb.TokenLogprobs(logprob=told.logprob, top=top)
