"""The pods of a rendered chart on nodes that share nothing but a network, with a real Ray.

Each group's parameters of `ray start`, environment and scripts are the rendered ones; what a
container's file system would be is a folder of each node.
"""

import asyncio
import json
import secrets
import shlex
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Self

from tests.cluster.nodes import Node, Nodes
from tests.deploy.chart import CHART, NAMESPACE, Document, Group, groups, spec_text

PATIENCE_S = 240.0
_LOOK_AGAIN_S = 0.2
_SMALL = ("--object-store-memory=80000000", "--dashboard-agent-listen-port=0")
"""What this machine needs, and Kubernetes does not."""
_API_PORT = 6443
"""On the first node, where nobody else is."""


class Pods:
    """`async with Pods(documents, folder) as pods:` — Ray runs, and the head's other containers.

    What secrets are mounted as is read from `folder`/etc/baton.
    """

    def __init__(self, documents: list[Document], folder: Path) -> None:
        self._groups = groups(documents)
        self.nodes = Nodes(len(self._groups), folder)
        self.address = f"{self.nodes[1].address}:6379"
        self.applied = self.nodes[1].files / "applied"
        self._folder = folder
        self._spec = folder / "cluster.yaml"
        self._etc = folder / "etc" / "baton"
        self._spec.write_text(spec_text(documents).replace("/etc/baton", str(self._etc)))
        self._token = secrets.token_hex(32)
        self._processes: list[subprocess.Popen[str]] = []
        self._files = ExitStack()

    async def __aenter__(self) -> Self:
        self.nodes.__enter__()
        try:
            for index, group in enumerate(self._groups, 1):
                self._start(self.nodes[index], group)
                await self._until_said(group.name, "block forever")
            self._control()
        except BaseException:
            await self.__aexit__(None, None, None)
            raise
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.nodes.__exit__(kind, error, trace)
        for process in self._processes:
            await asyncio.to_thread(process.wait, 20)
        self._files.close()

    def node(self, group: str) -> Node:
        """Return the node of a group."""
        names = [found.name for found in self._groups]
        return self.nodes[names.index(group) + 1]

    def log(self, name: str) -> Path:
        return self._folder / f"{name}.log"

    def environment(self, group: Group) -> dict[str, str]:
        """Return that of Ray's container; the password is what KubeRay adds."""
        rendered = {entry["name"]: entry["value"] for entry in group.ray["env"]}
        here = {
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN": self._token,
            # Importing Baton's Ray calls has said "0" here, for a Ray on 127.0.0.1.
            "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "1",
            "PYTHONUNBUFFERED": "1",
            "XDG_STATE_HOME": str(self.nodes.own),
        }
        return {**rendered, **here}

    def _start(self, node: Node, group: Group) -> None:
        """Begin `ray start` as KubeRay would."""
        limits = group.ray["resources"]["limits"]
        parameters = {"num-cpus": limits["cpu"], **group.start}
        # KubeRay gives them to a shell.
        words = shlex.split(" ".join(f"--{key}={value}" for key, value in parameters.items()))
        first = node is self.nodes[1]
        role = ["--head", f"--temp-dir={self.nodes.own}/r"] if first else []
        address = [] if first else [f"--address={self.address}"]
        main = "from ray.scripts.scripts import main; main()"
        place = [f"--node-ip-address={node.address}", *_SMALL]
        command = [sys.executable, "-c", main, "start", *role, *address, "--block", *place, *words]
        self._spawn(node, group, command)

    def _control(self) -> None:
        head = self._groups[0]
        (_, controller, *_) = head.spec["containers"]
        assert controller["command"][1].endswith("/controller.sh")
        assert controller["args"][0] == "baton"
        replaced = {"/etc/baton/spec/cluster.yaml": str(self._spec), "$(POD_IP):6379": self.address}
        words = [replaced.get(word, word) for word in controller["args"][1:]]
        script = ["sh", str(CHART / "scripts" / "controller.sh"), str(self._spec), "1"]
        self._spawn(
            self.nodes[1],
            head,
            [*script, sys.executable, "-m", "baton.cli.main", *words],
            name="controller",
            BATON_APPLIED_FILE=str(self.nodes.own / "applied"),
            BATON_RAY_SESSION=str(self.nodes.own / "r" / "session_latest"),
        )

    def size(self, pools: Path) -> None:
        """Begin what sizes pools, and an API server whose BatonPools are the files of a folder."""
        head = self._groups[0]
        (container,) = [c for c in head.spec["containers"] if c["name"] == "sizes"]
        (pools / "token").write_text("secret")
        replaced = {"$(POD_IP)": self.nodes[1].address, "/etc/baton/spec": str(self._folder)}
        words = [f"--api=http://127.0.0.1:{_API_PORT}", f"--account={pools}"]
        for argument in container["args"]:
            for old, new in replaced.items():
                argument = argument.replace(old, new)
            words.append(argument)
        server = [sys.executable, "-m", "tests.deploy.api_server", str(_API_PORT), str(pools)]
        self._spawn(self.nodes[1], head, [*server, NAMESPACE], name="api")
        script = str(CHART / "scripts" / "sizes.py")
        self._spawn(self.nodes[1], head, [sys.executable, script, *words], name="sizes")

    async def until_told(self, pools: Path, name: str, **status: int) -> None:
        """Wait until a BatonPool's status says this."""

        def so() -> bool:
            told = json.loads((pools / f"{name}.json").read_text()).get("status", {})
            return status.items() <= told.items()

        await self._until(so, "sizes")

    def _spawn(
        self, node: Node, group: Group, words: list[str], name: str = "", **environment: str
    ) -> None:
        output = self._files.enter_context(self.log(name or group.name).open("w"))
        known = {**self.environment(group), **environment}
        self._processes.append(node.spawn(*words, output=output, environment=known))

    async def _until_said(self, name: str, words: str) -> None:
        await self._until(lambda: words in self.log(name).read_text(), name)

    async def until_applied(self) -> None:
        """Wait until `baton up` has returned; if it never does, its log says why."""
        await self._until(self.applied.exists, "controller")

    async def _until(self, there: Callable[[], bool], name: str) -> None:
        deadline = time.monotonic() + PATIENCE_S
        while not there():
            assert time.monotonic() < deadline, self.log(name).read_text()
            await asyncio.sleep(_LOOK_AGAIN_S)

    async def drain(self, group: str) -> None:
        """Do what Kubernetes does before the pod of a group ends."""
        script = str(CHART / "scripts" / "drain.sh")
        within_s = str(int(PATIENCE_S))
        await asyncio.to_thread(self.node(group).run, "sh", script, "0", within_s, timeout=600)

    def processes(self, group: str, title: str) -> set[str]:
        """Return the pids of a group's processes with some title, as its node knows them."""
        lines = self.node(group).run("ps", "-eo", "pid=,args=").splitlines()
        return {line.split()[0] for line in lines if line.split()[1].startswith(title)}
