"""What the chart renders for a laptop is brought up, serves, and drains when a pod ends."""

import json
import shutil
import sys
from pathlib import Path

import pytest

from baton.cli.certs import write_certs
from tests.cluster.nodes import why_not
from tests.deploy.api_server import put
from tests.deploy.chart import NAME, Document, example, rendered
from tests.deploy.pods import Pods
from tests.deploy.test_values import merged

pytestmark = [
    # Three Rays start, each in some twenty seconds on a busy machine.
    pytest.mark.slow,
    pytest.mark.skipif(why_not() is not None, reason=str(why_not())),
    pytest.mark.timeout(900),
]
GATEWAY = "10.77.0.3"
_ASK = """
import ssl, sys, urllib.request
url, body, authority = sys.argv[1:]
context = ssl.create_default_context(cafile=authority) if authority else None
request = urllib.request.Request(url, body.encode() or None, {"Content-Type": "application/json"})
print(urllib.request.urlopen(request, timeout=60, context=context).read().decode())
"""


def laptop(model_dir: Path, **more: Document) -> Document:
    models = [{"id": "demo", "name": "baton-demo", "path": str(model_dir)}]
    return merged(example("laptop"), {"models": models, **more})


def ask(pods: Pods, path: str, body: str = "", authority: str = "") -> Document:
    assert pods.node("gateway-demo").address == GATEWAY
    url = f"{'https' if authority else 'http'}://{GATEWAY}:8000{path}"
    answer: Document = json.loads(
        pods.nodes[1].run(sys.executable, "-c", _ASK, url, body, authority)
    )
    return answer


def complete(pods: Pods, authority: str = "") -> int:
    """Return how many tokens come of a request."""
    assert ask(pods, "/health", authority=authority)["status"] == "ok"
    body = json.dumps({"model": "baton-demo", "prompt": "def f(n):\n", "max_tokens": 8})
    tokens: int = ask(pods, "/v1/completions", body, authority)["usage"]["completion_tokens"]
    return tokens


async def test_the_laptops_chart_comes_up_and_serves(tmp_path: Path, demo_model_dir: Path) -> None:
    async with Pods(rendered(laptop(demo_model_dir)), tmp_path) as pods:
        await pods.until_applied()
        assert complete(pods) > 0
        gateways = pods.processes("gateway-demo", "ray::GatewayActor")
        instances = pods.processes("decode", "ray::InstanceActor")
        assert (len(gateways), len(instances)) == (1, 2)
        # Ray starts a gateway again for as long as its node is there: another process.
        await pods.drain("gateway-demo")
        assert not gateways & pods.processes("gateway-demo", "ray::GatewayActor")


def make_secrets(folder: Path) -> str:
    """Write the files of the two secrets as Kubernetes mounts them; return the users' authority."""
    made = folder / "made"
    write_certs(made, (GATEWAY,), 1)
    for secret, name, authority in (
        ("gateway-tls", "server", "ca"),
        ("cluster-tls", "cluster", "cluster-ca"),
    ):
        mounted = folder / "etc" / "baton" / secret
        mounted.mkdir(parents=True)
        shutil.copy(made / f"{name}.pem", mounted / "tls.crt")
        shutil.copy(made / f"{name}.key", mounted / "tls.key")
        shutil.copy(made / f"{authority}.pem", mounted / "ca.crt")
    return str(made / "ca.pem")


async def test_with_tls_and_ranks_it_serves_and_takes_the_size_that_others_say(
    tmp_path: Path, demo_model_dir: Path
) -> None:
    values = laptop(
        demo_model_dir,
        decode={"pool": {"parallel": {"tp": 2}}, "resources": {"limits": {"cpu": "5"}}},
        tls={
            "gateway": {"enabled": True, "secretName": "one"},
            "cluster": {"enabled": True, "secretName": "two"},
        },
        scaling={"by": "keda", "pauseSeconds": 1},
    )
    authority, pools, decode = make_secrets(tmp_path), tmp_path / "pools", f"{NAME}-demo-decode"
    pools.mkdir()
    put(pools, f"{NAME}-demo-prefill", {"spec": {"pool": "demo-prefill", "replicas": 1}})
    put(pools, decode, {"spec": {"pool": "demo-decode", "replicas": 2}})
    async with Pods(rendered(values), tmp_path) as pods:
        await pods.until_applied()
        assert complete(pods, authority) > 0
        assert len(pods.processes("decode", "ray::InstanceActor")) == 3, "one, and two ranks"
        pods.size(pools)
        await pods.until_told(pools, decode, replicas=2, readyReplicas=2)
        put(pools, decode, {"spec": {"pool": "demo-decode", "replicas": 1}})
        await pods.until_told(pools, decode, replicas=1, readyReplicas=1)
        assert complete(pods, authority) > 0
