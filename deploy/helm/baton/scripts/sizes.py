"""Gives each pool the size that its BatonPool asks for, and tells there what came of it.

A BatonPool is what an HPA or KEDA scales. Baton stays who starts and drains instances; where Ray's
nodes lack room, Ray's autoscaler is asked for more. Runs beside Ray's head, until it is ended.
"""

import argparse
import asyncio
import json
import ssl
import sys
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from baton.cli.attached import Attached, attached, found_note
from baton.cluster import ray_calls
from baton.cluster.placement import Resources, room_of
from baton.cluster.spec import load_spec
from baton.core.errors import BatonError, InvalidRequest, Unavailable

_API_TIMEOUT_S = 10.0
_RAY_TIMEOUT_S = 10.0
_ACCOUNT = Path("/var/run/secrets/kubernetes.io/serviceaccount")
_RETRY_S = 10.0


@dataclass(frozen=True, slots=True)
class PoolState:
    """The status of a BatonPool, in Kubernetes' words."""

    replicas: int
    readyReplicas: int  # noqa: N815
    selector: str
    problem: str


class Kubernetes:
    """The BatonPools of one namespace; `url` is that of the API server. Raises OSError."""

    def __init__(self, url: str, namespace: str, account: Path = _ACCOUNT) -> None:
        self._base = f"{url}/apis/baton-serve.io/v1alpha1/namespaces/{namespace}/batonpools"
        self._account = account
        authority = account / "ca.crt"
        self._context = ssl.create_default_context(cafile=authority) if authority.exists() else None

    def asked(self, name: str) -> int:
        """Return how many instances are asked for."""
        found: int = self._call("GET", name)["spec"]["replicas"]
        return found

    def tell(self, name: str, state: PoolState) -> None:
        """Write the status."""
        self._call("PATCH", f"{name}/status", {"status": asdict(state)})

    def _call(self, method: str, path: str, body: Any = None) -> Any:
        # Kubernetes exchanges the token before it runs out.
        token = (self._account / "token").read_text().strip()
        headers = {
            "Authorization": f"Bearer {token}",
            "Content-Type": "application/merge-patch+json",
        }
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(f"{self._base}/{path}", data, headers, method=method)
        try:
            with urllib.request.urlopen(
                request, timeout=_API_TIMEOUT_S, context=self._context
            ) as answer:
                return json.load(answer)
        except urllib.error.HTTPError as error:
            raise OSError(f"{method} batonpool {path}: {error}") from None


def bundles(spec: Path, sizes: Mapping[str, int]) -> list[Resources]:
    """Return the room that all pools take with these sizes."""
    pools = load_spec(spec).pools()
    found: list[Resources] = []
    for name, (_, pool) in pools.items():
        found += list(room_of(pool).bundles) * sizes.get(name, 0)
    return found


async def resized(cluster: Attached, pool: str, wanted: int, asked: int) -> tuple[int, str, bool]:
    """Bring a pool to `asked`, or as near as there is room.

    Returns its size then, what is in the way, and whether that is room.
    """
    problem = ""
    for target in range(asked, wanted, -1) if asked > wanted else (asked,):
        try:
            await cluster.call("scale", pool, target)
            return target, problem, bool(problem)
        except Unavailable as error:
            problem = problem or str(error)
        except InvalidRequest as error:
            return wanted, str(error), False
    return wanted, problem, True


async def look(cluster: Attached, api: Kubernetes, prefix: str) -> tuple[dict[str, int], bool]:
    """Bring each pool to what is asked; return all sizes as asked, and whether room is lacking."""
    lacking = False
    sizes: dict[str, int] = {}
    for pool in (await cluster.call("status")).pools:
        name = f"{prefix}-{pool.name}"
        asked = await asyncio.to_thread(api.asked, name)
        wanted, problem, short = pool.wanted, "", False
        if asked != wanted:
            wanted, problem, short = await resized(cluster, pool.name, wanted, asked)
        lacking |= short
        ready = sum(instance.phase == "ready" for instance in pool.instances)
        selector = f"ray.io/cluster={prefix},ray.io/group={pool.name.rpartition('-')[2]}"
        await asyncio.to_thread(api.tell, name, PoolState(wanted, ready, selector, problem))
        sizes[pool.name] = max(asked, wanted)
    return sizes, lacking


async def follow(address: str, spec: Path, api: Kubernetes, prefix: str, pause_s: float) -> None:
    """Look again and again, and ask Ray for nodes as long as some are lacking."""
    async with attached(found_note(address)) as cluster:
        asked_ray = False
        while True:
            sizes, lacking = await look(cluster, api, prefix)
            if lacking or asked_ray:
                room = bundles(spec, sizes) if lacking else []
                await ray_calls.request_resources(room, _RAY_TIMEOUT_S)
                asked_ray = lacking
            await asyncio.sleep(pause_s)


def main(say: Callable[[str], Any] = sys.stderr.write) -> None:
    """Follow for ever; whatever fails is told, and tried again."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--address", required=True, help="host:port of Ray's head")
    parser.add_argument("--spec", type=Path, required=True, help="the cluster's spec")
    parser.add_argument("--namespace", required=True, help="of the BatonPools")
    parser.add_argument("--prefix", required=True, help="of their names")
    parser.add_argument("--pause", type=float, required=True, help="seconds between looks")
    parser.add_argument("--api", default="https://kubernetes.default.svc", help="Kubernetes' API")
    parser.add_argument("--account", type=Path, default=_ACCOUNT, help="folder of its token")
    given = parser.parse_args()

    async def run() -> None:
        while True:
            try:
                api = Kubernetes(given.api, given.namespace, given.account)
                await follow(given.address, given.spec, api, given.prefix, given.pause)
            except (BatonError, OSError) as error:
                say(f"{error}\n")
            await asyncio.sleep(_RETRY_S)

    asyncio.run(run())


if __name__ == "__main__":
    main()
