"""What the chart renders for a laptop is brought up, serves, and drains when a pod ends."""

import json
import sys
from pathlib import Path

import pytest

from tests.cluster.nodes import why_not
from tests.deploy.chart import example, rendered
from tests.deploy.pods import Pods

pytestmark = [
    # Three Rays start, each in some twenty seconds on a busy machine.
    pytest.mark.slow,
    pytest.mark.skipif(why_not() is not None, reason=str(why_not())),
    pytest.mark.timeout(900),
]
_ASK = """
import sys, urllib.request
url, body = sys.argv[1:]
request = urllib.request.Request(url, body.encode() or None, {"Content-Type": "application/json"})
print(urllib.request.urlopen(request, timeout=60).read().decode())
"""


async def test_the_laptops_chart_comes_up_and_serves(tmp_path: Path, demo_model_dir: Path) -> None:
    values = example("laptop")
    values["models"] = [{"id": "demo", "name": "baton-demo", "path": str(demo_model_dir)}]
    async with Pods(rendered(values), tmp_path) as pods:
        await pods.until_applied()
        base = f"http://{pods.node('gateway-demo').address}:8000"

        def ask(path: str, body: str = "") -> dict[str, object]:
            answer: dict[str, object] = json.loads(
                pods.nodes[1].run(sys.executable, "-c", _ASK, f"{base}{path}", body)
            )
            return answer

        assert ask("/health")["status"] == "ok"
        body = json.dumps({"model": "baton-demo", "prompt": "def f(n):\n", "max_tokens": 8})
        assert ask("/v1/completions", body)["usage"]["completion_tokens"] > 0  # type: ignore[index]
        gateways = pods.processes("gateway-demo", "ray::GatewayActor")
        instances = pods.processes("decode", "ray::InstanceActor")
        assert (len(gateways), len(instances)) == (1, 2)
        # Ray starts a gateway again for as long as its node is there: another process.
        await pods.drain("gateway-demo")
        assert not gateways & pods.processes("gateway-demo", "ray::GatewayActor")
