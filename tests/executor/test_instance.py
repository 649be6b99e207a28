from pathlib import Path

import pytest

from baton.core.config import EngineConfig, HandoverConfig, WorkerConfig
from baton.core.errors import InvalidConfig, TransportError
from baton.core.ids import Incarnation
from baton.core.topology import Role
from baton.executor.instance import Instance, open_negotiated
from baton.kv_transfer.transport import Region, Transport


class NoListener:
    """Hears of no step, since there is none."""


async def test_what_the_scheduler_refuses_leaves_no_transport_open(
    tiny_llama_dir: Path,
) -> None:
    opened: list[Transport] = []

    async def open_transport(
        config: WorkerConfig, region: Region, incarnation: Incarnation
    ) -> Transport:
        opened.append(await open_negotiated(config, region, incarnation))
        return opened[-1]

    config = WorkerConfig(
        instance_id="decode-0",
        role=Role.DECODE,
        model_dir=tiny_llama_dir,
        model_name="tiny",
        engine=EngineConfig(kv_memory_mib=8, block_size=32, max_batch_tokens=16),
        handover=HandoverConfig(transport="tcp").with_secret(),
    )
    with pytest.raises(InvalidConfig, match="max_batch_tokens"):
        await Instance.load(config, NoListener(), print, open_transport)  # type: ignore[arg-type]
    (transport,) = opened
    with pytest.raises(TransportError, match="the transport is closed"):
        await transport.add_peer(transport.metadata())
