"""The OpenAPI description of the HTTP API, made from the bounds by which bodies are checked."""

from typing import Any

from baton import __version__
from baton.api.http import schemas
from baton.api.http.schemas import Schema
from baton.api.validate import ServedModel

_STATUSES = {
    "400": "A field is not allowed; `param` names it.",
    "401": "There is no API key, or it is not known.",
    "404": "There is no such model.",
    "408": "The body came too slowly.",
    "413": "The body is too large.",
    "415": "The body is not application/json.",
    "429": "Too much is under way; `Retry-After` says when to come back.",
    "431": "The headers are too large.",
    "500": "A bug.",
    "503": "Nobody can serve it now.",
    "504": "It took too long.",
}


def describe(model: ServedModel) -> dict[str, Any]:
    """Return the description, in OpenAPI 3.1, of what is accepted for `model`.

    It cannot tell rules between fields, such as that `top_logprobs` needs `logprobs`, nor what the
    model's chat template accepts: these are 400 as well.
    """
    bodies = {
        "Completion": schemas.completion(model),
        "Chat": schemas.chat(model),
        "Tokenize": schemas.tokenize(model),
        "Detokenize": schemas.detokenize(model),
    }
    return {
        "openapi": "3.1.0",
        "info": {"title": "Baton", "version": __version__},
        "paths": {
            "/v1/completions": _post("Continue a text.", "Completion", streams=True),
            "/v1/chat/completions": _post("Continue a chat.", "Chat", streams=True),
            "/tokenize": _post("Return the tokens of a text or a chat.", "Tokenize"),
            "/detokenize": _post("Return the text of tokens.", "Detokenize"),
            "/v1/models": _get("List the models."),
            "/v1/models/{name}": _get("Return one model.", "name"),
            "/v1/requests": _get("List where the time of the last requests went."),
            "/v1/status": _get("Tell how instances and load are; for admins."),
            "/v1/requests/{request_id}": _get("Tell where a request's time went.", "request_id"),
            "/version": _get("Return the version."),
            "/health": _get("Say whether requests can be served.", unhealthy=True),
        },
        "components": {"schemas": {**bodies, "Error": _ERROR}},
    }


def _post(summary: str, body: str, *, streams: bool = False) -> Schema:
    content: Schema = {"application/json": {"schema": {"type": "object"}}}
    if streams:
        content["text/event-stream"] = {"schema": {"type": "string"}}
    reference = {"$ref": f"#/components/schemas/{body}"}
    return {
        "post": {
            "summary": summary,
            "requestBody": {
                "required": True,
                "content": {"application/json": {"schema": reference}},
            },
            "responses": {
                "200": {"description": "Done.", "content": content},
                **_errors(_STATUSES),
            },
        }
    }


def _get(summary: str, name: str = "", *, unhealthy: bool = False) -> Schema:
    told = {"application/json": {"schema": {"type": "object"}}}
    responses: Schema = {"200": {"description": "Done.", "content": told}}
    if unhealthy:
        responses["503"] = {"description": "They cannot.", "content": told}
    parameters = []
    if name:
        responses |= _errors({"404": "There is no such thing."})
        parameters = [{"name": name, "in": "path", "required": True, "schema": {"type": "string"}}]
    return {"get": {"summary": summary, "parameters": parameters, "responses": responses}}


def _errors(statuses: dict[str, str]) -> Schema:
    content = {"application/json": {"schema": {"$ref": "#/components/schemas/Error"}}}
    return {
        status: {"description": description, "content": content}
        for status, description in statuses.items()
    }


_ERROR: Schema = {
    "type": "object",
    "required": ["error"],
    "additionalProperties": False,
    "properties": {
        "error": {
            "type": "object",
            "required": ["message", "type", "param", "code"],
            "additionalProperties": False,
            "properties": {
                "message": {"type": "string"},
                "type": {"type": "string"},
                "param": {"type": ["string", "null"]},
                "code": {"type": "string"},
            },
        }
    },
}
