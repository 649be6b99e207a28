"""Faults inside a prefill process: what a bug, or a peer of another make, would do to decode."""

import asyncio
from dataclasses import replace
from typing import Any

from baton.core.errors import Overloaded
from baton.core.handover import Offer, ToDecode
from baton.prefill_worker.session import HandoverSession
from baton.prefill_worker.worker import PrefillWorker

from .armed import Armed


def make_faulty(worker: PrefillWorker, armed: Armed) -> None:
    """Let the armed faults strike this process; `HandoverSession` is never the same again."""
    _refuse_prompts(worker, armed)
    send_offer = HandoverSession._send_offer
    loop = asyncio.get_running_loop()

    async def faulty_send_offer(session: HandoverSession, action: Any) -> None:
        write = session._write
        for fault in armed.happened("offer"):
            if fault.kind == "overwrite" and action.first is None:
                armed.put_off(fault)  # prefill itself still computes with this KV
            elif fault.kind == "overwrite" and (worker.instance.config.engine.prefix_cache):
                pass  # and here the next prompts would
            elif fault.kind == "lose_offer":
                armed.struck(fault, repr(session))
                return
            else:
                session._write = _faulty_write(session, armed, fault, loop)
        try:
            await send_offer(session, action)
        finally:
            session._write = write

    HandoverSession._send_offer = faulty_send_offer  # type: ignore[method-assign]


def _refuse_prompts(worker: PrefillWorker, armed: Armed) -> None:
    submit = worker.instance.engine.submit

    def faulty_submit(request: Any, *, hold: bool = False) -> Any:
        for fault in armed.happened("submit"):
            armed.struck(fault, request.request_id)
            raise Overloaded("this prompt was made to be refused")
        return submit(request, hold=hold)

    worker.instance.engine.submit = faulty_submit  # type: ignore[method-assign]


def _faulty_write(session: HandoverSession, armed: Armed, fault: Any, loop: Any) -> Any:
    write = session._write

    async def faulty(message: ToDecode) -> None:
        if not isinstance(message, Offer):
            await write(message)
        elif fault.kind == "repeat_offer":
            armed.struck(fault, f"offer {message.index} of {session!r}")
            await write(replace(message))
            await write(message)
        else:  # its digests are made, and somebody else's KV comes into the blocks
            if message.blocks:
                block = message.blocks[fault.seed % len(message.blocks)].ref.block
                session._instance.kv.tensor[block, message.layers.start : message.layers.end] += 1.0
                armed.struck(fault, f"block {block} of {session!r}")
            await write(message)

    return faulty
