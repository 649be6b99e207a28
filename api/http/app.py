"""The routes of the HTTP API."""

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from baton.api.gateway import Gateway
from baton.api.http import errors
from baton.api.http.answer import Answer
from baton.api.http.body import read_call
from baton.api.http.edge import Edge
from baton.api.http.openai_format import ChatFormat, CompletionFormat
from baton.api.validate import chat_call, completion_call
from baton.core.errors import BatonError, Cancelled, UnknownModel
from baton.core.metrics import CONTENT_TYPE


def build_app(gateway: Gateway) -> FastAPI:
    """Return the ASGI application that serves `gateway`.

    Bodies are checked by api/validate.py and not by FastAPI, so that HTTP and gRPC refuse the same
    values with the same words.
    """
    app = FastAPI(title="Baton", openapi_url=None)
    errors.install(app)
    app.add_middleware(Edge, gateway=gateway)
    _add_openai_routes(app, gateway)
    _add_own_routes(app, gateway)
    return app


def _add_openai_routes(app: FastAPI, gateway: Gateway) -> None:
    @app.get("/v1/models")
    async def models(request: Request) -> JSONResponse:
        data = [_model(gateway)] if gateway.serves(request.state.caller) else []
        return JSONResponse({"object": "list", "data": data})

    @app.get("/v1/models/{name:path}")
    async def model(request: Request, name: str) -> JSONResponse:
        if not gateway.serves(request.state.caller, name):
            raise UnknownModel("model", name, gateway.model_name)
        return JSONResponse(_model(gateway))

    @app.post("/v1/completions")
    async def completions(request: Request) -> Response:
        return await _answer(request, gateway, chat=False)

    @app.post("/v1/chat/completions")
    async def chat_completions(request: Request) -> Response:
        return await _answer(request, gateway, chat=True)


def _add_own_routes(app: FastAPI, gateway: Gateway) -> None:
    @app.get("/health")
    async def health() -> JSONResponse:
        reasons = gateway.health()
        status = "unavailable" if reasons else "ok"
        return JSONResponse({"status": status, "reasons": reasons}, 503 if reasons else 200)

    @app.get("/metrics")
    async def metrics() -> Response:
        return Response(gateway.metrics.render(), media_type=CONTENT_TYPE)

    @app.get("/v1/requests/{request_id}")
    async def request_trace(request: Request, request_id: str) -> JSONResponse:
        trace = gateway.trace(request_id, request.state.caller)
        if trace is None:
            raise HTTPException(404, "no such request, or it is open, or its trace is forgotten")
        return JSONResponse(trace.as_dict())


async def _answer(request: Request, gateway: Gateway, *, chat: bool) -> Response:
    try:
        check = chat_call if chat else completion_call
        await gateway.some_decode()
        model = gateway.model(request.state.caller)
        call = await read_call(request, check, model, gateway.config.limits)
    except ClientDisconnect:
        gateway.metrics.refused(Cancelled.code)
        return Response(status_code=Cancelled.http_status)
    except BatonError as error:
        gateway.metrics.refused(error.code)
        raise
    form = (ChatFormat if chat else CompletionFormat)(
        call.call_id,
        gateway.model_name,
        gateway.token_bytes,
        include_usage=call.include_usage,
    )
    return Answer(gateway, call, form)


def _model(gateway: Gateway) -> dict[str, object]:
    return {
        "id": gateway.model_name,
        "object": "model",
        "created": gateway.created,
        "owned_by": "baton",
    }
