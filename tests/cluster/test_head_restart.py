"""Ray's head and all of its node end, and start again: what lies in Redis comes back."""

import os
import random
import shutil
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from baton.cluster import ray_calls, ray_environment
from baton.cluster.ray_head import RayHead
from tests.cluster.controllers import Cluster, spec

REDIS = shutil.which("redis-server")


def free_port() -> int:
    # Below the ports that Ray gives to its workers, and that the kernel gives to anybody. At
    # random, since nobody keeps it until it is used, and others may look for one as well.
    for port in random.sample(range(6400, 9000), 2600):
        with socket.socket() as trial:
            if trial.connect_ex(("127.0.0.1", port)):
                return port
    raise AssertionError("no port is free")


@pytest.fixture
def redis(tmp_path: Path) -> Iterator[str]:
    """host:port of a Redis of our own, that keeps nothing beyond its life."""
    assert REDIS is not None
    port = free_port()
    options = ("--bind", "127.0.0.1", "--port", str(port), "--save", "", "--dir", str(tmp_path))
    with subprocess.Popen([REDIS, *options], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert any("Ready to accept" in line for line in process.stdout)
        yield f"127.0.0.1:{port}"
        process.kill()


@pytest.mark.skipif(REDIS is None, reason="no redis-server on the PATH")
@pytest.mark.timeout(400)
async def test_what_is_wanted_survives_the_head(
    redis: str, monkeypatch: pytest.MonkeyPatch, short_temp_dir: Path
) -> None:
    monkeypatch.setenv("PYTHONPATH", f"{Path(__file__).parent}:{os.environ.get('PYTHONPATH', '')}")
    environment = {**ray_environment.head_environment(1), "RAY_REDIS_ADDRESS": redis}
    port, control = free_port(), Cluster(short_temp_dir / "logs")

    async def start() -> RayHead:
        head = await RayHead.start(
            short_temp_dir, slots=4, environment=environment, timeout_s=120, port=port
        )
        await ray_calls.connect(head.address, 60)
        return head

    head = await start()
    try:
        await control.start()
        await control.ask("apply", spec())
        await control.ask("scale", "decode", 2)
        before = await control.instances()
        await ray_calls.disconnect(60)
        await head.stop(grace_s=0)

        head = await start()
        after = await control.instances()
        assert sorted(after) == sorted(before) == ["decode-0", "decode-1", "prefill-0"]
        assert control.epoch > 1000
        assert not {i.incarnation for i in after.values()} & {
            i.incarnation for i in before.values()
        }
        await ray_calls.disconnect(60)
    finally:
        await head.stop(grace_s=20)
