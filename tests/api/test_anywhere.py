"""Two gateways over one instance: each answers for what the other has."""

from contextlib import aclosing

import grpc
import httpx
import pytest

from baton.api.anywhere import cancel, explain, trace
from baton.api.peers import Ended
from baton.api.request_names import gateway_of
from baton.api.validate import completion_call
from baton.core.errors import Cancelled, Unavailable
from baton.core.tenants import ANYBODY, Caller, Tenant
from baton.proto import inference_pb2 as pb
from baton.proto import inference_pb2_grpc as pb_grpc

SOON = 60
GONE = "gateway-9.9"


class Neighbours:
    """The way to gateways in this process; GONE cannot be asked."""

    def __init__(self, name: str, gateways: dict) -> None:
        self.name = name
        self.asked: list[tuple[str, Caller]] = []
        self._gateways = gateways

    def _of(self, gateway, caller):
        self.asked.append((gateway, caller))
        if gateway == GONE:
            raise Unavailable(f"{gateway} does not answer")
        return self._gateways[gateway]

    async def cancel(self, gateway, request_id, caller):
        return self._of(gateway, caller).cancel(request_id, caller)

    async def explain(self, gateway, request_id, caller):
        return self._of(gateway, caller).explain(request_id, caller)

    async def trace(self, gateway, request_id, caller):
        return self._of(gateway, caller).trace(request_id, caller)


@pytest.fixture
async def pair(make_front_door):
    doors: dict = {}
    gateways: dict = {}
    for number in range(2):
        name = f"gateway-{number}.{number + 1}"
        doors[name] = await make_front_door(peers=Neighbours(name, gateways))
        gateways[name] = doors[name].gateway
    return list(doors.values())


@pytest.fixture
def request_at():
    def make(gateway, caller=ANYBODY, **fields):
        model = gateway.model(caller)
        return completion_call({"prompt": "hi", **fields}, model).requests[0]

    return make


async def first_piece(pieces):
    return (await anext(pieces)).text


async def test_any_gateway_cancels_explains_and_shows(pair, leader, text_script, request_at):
    here, there = (door.gateway for door in pair)
    leader.script = text_script("one two three", hold_after=1)
    request = request_at(here)
    name = request.generate.request_id
    assert gateway_of(name) == here.peers.name
    async with aclosing(here.generate(request)) as pieces:
        assert await first_piece(pieces) == "one"
        assert await explain(there, name, ANYBODY) == here.explain(name)
        assert await trace(there, name, ANYBODY) is None
        assert await cancel(there, name, ANYBODY) == Ended(1, 0)
        with pytest.raises(Cancelled):
            await anext(pieces)
        assert await cancel(there, name, ANYBODY) == Ended(0, 0)
    await here.idle()
    shown = await trace(there, name, ANYBODY)
    assert shown is not None
    assert shown.error == "cancelled"
    assert {gateway for gateway, _ in there.peers.asked} == {here.peers.name}
    assert await explain(here, name, ANYBODY) == await explain(there, name, ANYBODY)
    assert not here.peers.asked, "its own it knows itself"


async def test_the_caller_stays_who_it_is(pair, leader, text_script, request_at):
    here, there = (door.gateway for door in pair)
    leader.script = text_script("one two three", hold_after=1)
    owner, stranger = Caller(Tenant(name="owner")), Caller(Tenant(name="stranger"))
    request = request_at(here, owner)
    name = request.generate.request_id
    async with aclosing(here.generate(request)) as pieces:
        await first_piece(pieces)
        assert await explain(there, name, stranger) is None
        assert await cancel(there, name, stranger) == Ended(0, 0)
        assert await cancel(there, name, owner) == Ended(1, 0)
    await here.idle()
    assert await trace(there, name, stranger) is None
    assert await trace(there, name, owner) is not None


async def test_a_gateway_that_cannot_be_asked_is_an_error_and_not_nothing(pair):
    name = f"gen-{GONE}-" + "0" * 24
    async with grpc.aio.insecure_channel(pair[0].grpc_address) as channel:
        stub = pb_grpc.InferenceStub(channel)
        for method, ask in ((stub.Cancel, pb.CancelRequest), (stub.Explain, pb.ExplainRequest)):
            with pytest.raises(grpc.aio.AioRpcError, match=f"{GONE} does not answer") as failed:
                await method(ask(request_id=name), timeout=SOON)
            assert failed.value.code() is grpc.StatusCode.UNAVAILABLE
    async with httpx.AsyncClient(base_url=pair[0].http_url, timeout=SOON) as http:
        assert (await http.get(f"/v1/requests/{name}/explain")).status_code == 503
