"""`baton serve`: start everything, say how to use it, and look after it until told to stop."""

import json
import time

from rich.console import Console

from baton.cli.console import Progress
from baton.cli.preflight import check_before_start
from baton.cli.stopping import Stopping
from baton.core.config import ClusterConfig


async def serve(config: ClusterConfig, console: Console, stopping: Stopping) -> None:
    """Serve until cancelled; raises BatonError if something is wrong with what was asked for."""
    began = time.monotonic()
    say = Progress(console)
    check_before_start(config)
    say("loading libraries")
    # Imported here: Ray, gRPC and FastAPI take seconds that a mistake in an option should not cost.
    from baton.cli.system import System, describe_instances, running

    def show(system: System) -> None:
        console.print(f"\n[bold green]Ready[/] after {time.monotonic() - began:.1f} s\n")
        for line in describe_instances(system.cluster):
            console.print(f"  {line}", markup=False)
        door = system.door
        console.print(f"\n  OpenAI HTTP API  {door.http_url}/v1", markup=False)
        console.print(f"  gRPC API         {door.grpc_address}", markup=False)
        console.print(f"  Console          {door.http_url}/console", markup=False)
        console.print(f"  logs             {system.cluster.temp_dir}/*.log", markup=False)
        console.print(f"\nTry it:\n\n{curl(door.http_url, config)}\n", markup=False)
        console.print("Ctrl-C stops everything.\n")

    def remember(cluster: object) -> None:
        stopping.hurry = cluster.hurry  # type: ignore[attr-defined]

    async with running(config, say, on_cluster=remember) as system:
        stopping.arm()
        show(system)
        stopping.expected = True
        await system.cluster.watch()


def curl(http_url: str, config: ClusterConfig) -> str:
    """Return a command that asks the server for a completion; ready to paste."""
    body = {
        "model": config.model_name,
        "prompt": "def is_prime(n):\n",
        "max_tokens": 64,
        "stream": True,
    }
    lines = [f"curl -N {http_url}/v1/completions -H 'Content-Type: application/json'"]
    tls = config.gateway.tls
    if tls is not None:
        shown = "" if tls.client_ca is None else " --cert CLIENT.pem --key CLIENT.key"
        lines.append(f"  --cacert CA.pem{shown}")
    if config.gateway.api_keys is not None:
        # From a pipe: everybody on the machine can read a process's arguments.
        lines.append('  -H @<(echo "Authorization: Bearer $BATON_API_KEY")')
    lines.append(f"  -d '{json.dumps(body)}'")
    return " \\\n".join(f"  {line}" for line in lines)
