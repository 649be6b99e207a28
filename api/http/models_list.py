"""The models that a caller may use, as OpenAI lists them: a row for each name and each alias."""

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse

from baton.api.gateway import Gateway
from baton.api.model_lane import ModelLane
from baton.core.errors import Unavailable
from baton.core.tenants import Caller


def add_models_routes(app: FastAPI, gateway: Gateway) -> None:
    """Add GET /v1/models and GET /v1/models/NAME."""

    @app.get("/v1/models")
    async def models(request: Request) -> JSONResponse:
        caller = request.state.caller
        listed = gateway.models.listed(caller)
        data = [_row(name, lane, caller, gateway.created) for name, lane in listed]
        return JSONResponse({"object": "list", "data": data})

    @app.get("/v1/models/{name:path}")
    async def model(request: Request, name: str) -> JSONResponse:
        caller = request.state.caller
        lane = gateway.models.of(caller, name)
        return JSONResponse(_row(name, lane, caller, gateway.created))


def _row(name: str, lane: ModelLane, caller: Caller, created: int) -> dict[str, object]:
    """Return what OpenAI tells of a model, and vLLM beside it: `root` is the model's own name."""
    try:
        max_model_len = lane.served(caller).max_model_len
    except Unavailable:  # Its first instance has yet to come.
        max_model_len = None
    return {
        "id": name,
        "object": "model",
        "created": created,
        "owned_by": "baton",
        "root": lane.front.name,
        "parent": None,
        "max_model_len": max_model_len,
    }
