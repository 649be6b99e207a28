from pathlib import Path
from typing import Any

import pytest

from baton.core.config import EngineConfig, HandoverConfig, WorkerConfig
from baton.core.errors import InvalidConfig, TransportError
from baton.core.topology import Role
from baton.executor.instance import Instance
from baton.executor.late_device import LateDevice
from baton.executor.rank_model import executor_of
from baton.kv_transfer import choose
from baton.kv_transfer.transport import Region, Transport


class NoListener:
    """Hears of no step, since there is none."""


async def test_what_the_scheduler_refuses_leaves_no_transport_open(
    tiny_llama_dir: Path,
) -> None:
    opened: list[Transport] = []

    async def open_transport(region: Region, config: HandoverConfig, **who: Any) -> Transport:
        opened.append(await choose.open_transport(region, config, **who))
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


def test_batch_invariance_is_refused_where_it_cannot_be_had() -> None:
    assert executor_of(EngineConfig(batch_invariant=True)) == "native"
    assert executor_of(EngineConfig(executor="torch")) == "torch"
    for more in ({"executor": "torch"}, {"kv_dtype": "bfloat16"}):
        with pytest.raises(InvalidConfig, match="batch_invariant: 'true'"):
            executor_of(EngineConfig(batch_invariant=True, **more))


def test_rounded_kv_takes_torch() -> None:
    assert executor_of(EngineConfig(kv_dtype="bfloat16")) == "torch"
    with pytest.raises(InvalidConfig, match="kv_dtype: 'bfloat16'"):
        executor_of(EngineConfig(kv_dtype="bfloat16", executor="native"))


@pytest.mark.parametrize("role", [Role.PREFILL, Role.DECODE])
async def test_a_worker_that_does_not_start_leaves_nothing_pinned(
    tiny_llama_dir: Path, role: Role
) -> None:
    device = LateDevice()
    config = WorkerConfig(
        instance_id="worker-0",
        role=role,
        model_dir=tiny_llama_dir,
        model_name="tiny",
        engine=EngineConfig(kv_memory_mib=8, block_size=32, max_batch_tokens=16),
        handover=HandoverConfig(transport="tcp", staging_mib=0).with_secret(),
    )
    with pytest.raises(InvalidConfig, match="max_batch_tokens"):
        await Instance.load(config, NoListener(), print, device=device)  # type: ignore[arg-type]
    device.check()
