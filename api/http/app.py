"""The routes of the HTTP API."""

import asyncio
from collections.abc import Callable
from typing import TypeVar

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from baton import __version__
from baton.api import anywhere
from baton.api.console.route import add_console
from baton.api.gateway import Gateway
from baton.api.http import errors
from baton.api.http.answer import Answer
from baton.api.http.body import Body, read_body
from baton.api.http.edge import Edge
from baton.api.http.models_list import add_models_routes
from baton.api.http.openai_format import ChatFormat, CompletionFormat
from baton.api.http.openapi import describe
from baton.api.http.request_ids import RequestIds
from baton.api.http.requests_list import add_requests_route
from baton.api.http.timing import arrived
from baton.api.status import RECENT
from baton.api.tokenize_call import detokenize_call, tokenize_call
from baton.api.validate import (
    Call,
    ServedModel,
    chat_call,
    check_call_grammar,
    completion_call,
    model_named,
    read_timeout,
)
from baton.core.clock import monotonic
from baton.core.errors import BatonError, Cancelled
from baton.core.metrics import CONTENT_TYPE


def build_app(gateway: Gateway) -> FastAPI:
    """Return the ASGI application that serves `gateway`.

    Bodies are checked by api/validate.py and not by FastAPI, so that HTTP and gRPC refuse the same
    values with the same words.
    """
    app = FastAPI(title="Baton", openapi_url=None)  # so its pages of documentation are off too
    errors.install(app)
    app.add_middleware(Edge, gateway=gateway)
    app.add_middleware(RequestIds)  # the outermost: refusals have an id too
    add_models_routes(app, gateway)
    _add_openai_routes(app, gateway)
    _add_text_routes(app, gateway)
    _add_own_routes(app, gateway)
    add_requests_route(app, gateway)
    add_console(app)
    return app


def _add_openai_routes(app: FastAPI, gateway: Gateway) -> None:
    @app.post("/v1/completions")
    async def completions(request: Request) -> Response:
        return await _answer(request, gateway, chat=False)

    @app.post("/v1/chat/completions")
    async def chat_completions(request: Request) -> Response:
        return await _answer(request, gateway, chat=True)


def _add_text_routes(app: FastAPI, gateway: Gateway) -> None:
    @app.post("/tokenize")
    async def tokenize(request: Request) -> JSONResponse:
        return JSONResponse(await _checked(request, gateway, tokenize_call))

    @app.post("/detokenize")
    async def detokenize(request: Request) -> JSONResponse:
        return JSONResponse(await _checked(request, gateway, detokenize_call))


def _add_own_routes(app: FastAPI, gateway: Gateway) -> None:
    @app.get("/health")
    async def health() -> JSONResponse:
        reasons = gateway.health()
        if not gateway.serves:
            return JSONResponse({"status": "unavailable", "reasons": reasons}, 503)
        return JSONResponse({"status": "degraded" if reasons else "ok", "reasons": reasons})

    @app.get("/version")
    async def version() -> JSONResponse:
        return JSONResponse({"version": __version__})

    @app.get("/openapi.json")
    async def openapi(request: Request) -> JSONResponse:
        """Describe what one model takes: ?model=NAME, by default the first of the caller's."""
        caller, name = request.state.caller, request.query_params.get("model")
        first = next((listed for listed, _ in gateway.models.listed(caller)), None)
        return JSONResponse(describe(gateway.model(caller, name or first)))

    @app.get("/metrics")
    async def metrics() -> Response:
        return Response(gateway.metrics.render(), media_type=CONTENT_TYPE)

    @app.get("/v1/requests/{request_id}/explain")
    async def explain(request: Request, request_id: str) -> JSONResponse:
        explanation = await anywhere.explain(gateway, request_id, request.state.caller)
        if explanation is None:
            raise HTTPException(404, "no such request, or its decision is forgotten")
        return JSONResponse(explanation)

    @app.get("/v1/status")
    async def status(request: Request) -> JSONResponse:
        caller = request.state.caller
        return JSONResponse(gateway.status(recent=RECENT, sees=lambda t: caller.sees(t.tenant)))

    @app.get("/v1/requests/{request_id}")
    async def request_trace(request: Request, request_id: str) -> JSONResponse:
        trace = await anywhere.trace(gateway, request_id, request.state.caller)
        if trace is None:
            raise HTTPException(404, "no such request, or it is open, or its trace is forgotten")
        return JSONResponse(trace.as_dict())


Result = TypeVar("Result")


async def _answer(request: Request, gateway: Gateway, *, chat: bool) -> Response:
    name = ""
    try:
        body = await read_body(request, gateway.config.limits)
        lane = gateway.models.of(request.state.caller, model_named(body.value))
        name = lane.front.name
        came_at = monotonic()
        await lane.some_decode()
        wake_s = monotonic() - came_at
        model = lane.served(request.state.caller)
        call = await _call(request, body, model, chat=chat)
        call = arrived(call, request, wake_s=wake_s, now=gateway.now())
    except ClientDisconnect:
        gateway.metrics.refused(Cancelled.code, name)
        return Response(status_code=Cancelled.http_status)
    except BatonError as error:
        gateway.metrics.refused(error.code, name)
        raise
    form = (ChatFormat if chat else CompletionFormat)(
        call.call_id,
        model.name,
        model.tokenizer.token_bytes,
        include_usage=call.include_usage,
    )
    return Answer(gateway, call, form)


async def _call(request: Request, body: Body, model: ServedModel, *, chat: bool) -> Call:
    call = await body.checked(chat_call if chat else completion_call, model)
    if call.constrained_by:
        await asyncio.to_thread(check_call_grammar, call, model)
    call = call.of_session(request.headers.get("x-session", ""))
    return call.due_within(read_timeout(request.headers.get("x-request-timeout-ms")))


async def _checked(
    request: Request, gateway: Gateway, check: Callable[[object, ServedModel], Result]
) -> Result:
    body = await read_body(request, gateway.config.limits)
    model = gateway.model(request.state.caller, model_named(body.value))
    return await body.checked(check, model)
