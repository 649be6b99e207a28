"""Several hosts on one machine, joined by a switch; any of them can be cut off or lose its power.

      hosts network, untouched        switch: a network namespace of its own
                                      ┌───────────── br0 ─────────────┐
                                      p1              p2              p3
                                      │ eth0          │ eth0          │ eth0
                                    node 1          node 2          node 3
                                   10.77.0.1       10.77.0.2       10.77.0.3

A node is a set of namespaces (network, mounts, processes, host name, IPC) around a pid 1 of its
own, with its own boot id and /dev/shm, and one folder that has the same path on all of them, and
on each other files. Nothing of it is on the network of this machine, so
two of these may run beside each other.
"""

import contextlib
import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import uuid
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from types import TracebackType
from typing import IO, Self

from . import node_init

_SECONDS = 20.0
_TOOLS = ("ip", "unshare", "nsenter", "mount")
_KINDS = ("--mount", "--pid", "--uts", "--ipc", "--fork", "--kill-child", "--mount-proc")


@cache
def why_not() -> str | None:
    """Return why no nodes can be made here; None if they can."""
    if missing := [tool for tool in _TOOLS if shutil.which(tool) is None]:
        return f"{', '.join(missing)} not found"
    if os.geteuid() != 0:
        return "only root can make network namespaces"
    name = f"bt{secrets.token_hex(3)}"
    try:
        error = _try_ip("netns", "add", name) or _try_all(name)
    finally:
        _try_ip("netns", "del", name)
    return f"no right to make namespaces, or no kernel for them: {error}" if error else None


def _try_all(name: str) -> str:
    """Return what in a namespace fails of all that nodes need, or an empty text."""
    inside = ("-n", name, "link", "add")
    for link in (("br0", "type", "bridge"), ("eth0", "type", "veth", "peer", "name", "p1")):
        if error := _try_ip(*inside, *link):
            return error
    script = f"mount -t tmpfs x /dev/shm && mount --bind /etc/passwd {node_init.BOOT_ID}"
    return _try_ip("netns", "exec", name, "unshare", *_KINDS, "sh", "-c", script)


class Node:
    """One host; made and ended by Nodes."""

    def __init__(self, index: int, prefix: str, state: Path, own: Path) -> None:
        self.index = index
        """From 1."""
        self.address = f"10.77.0.{index}"
        """In the network of the nodes."""
        self.own = own
        """The folder whose files are the node's own, as seen on the node; HOME and TMPDIR."""
        self.files = state / "own"
        """The same folder as seen from outside."""
        self._state = state
        self._namespace = f"{prefix}n{index}"
        self._switch = f"{prefix}sw"
        self._port = f"p{index}"
        self._guard: subprocess.Popen[str] | None = None
        self._init = 0

    def __repr__(self) -> str:
        return f"Node({self.index}, {self.address}, up={self.up})"

    @property
    def up(self) -> bool:
        """Whether it has power."""
        return self._guard is not None and self._guard.poll() is None

    def power_on(self) -> None:
        """Start it, empty: what its folder held is gone, and its boot id is another one."""
        assert not self.up, self
        shutil.rmtree(self._state, ignore_errors=True)
        self.files.mkdir(parents=True)
        (self._state / "boot_id").write_text(f"{uuid.uuid4()}\n")
        _ip("netns", "add", self._namespace)
        self._connect()
        places = (str(self._state), str(self.own))
        init = (sys.executable, node_init.__file__, *places, f"node{self.index}")
        self._guard = subprocess.Popen(
            ["ip", "netns", "exec", self._namespace, "unshare", *_KINDS, *init],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert self._guard.stdout is not None
        if self._guard.stdout.readline().strip() != node_init.READY:
            raise RuntimeError(f"{self} did not start")
        # `ip netns exec` becomes `unshare`, whose one child is the node's pid 1.
        children = Path(f"/proc/{self._guard.pid}/task/{self._guard.pid}/children").read_text()
        self._init = int(children.split()[0])

    def power_cut(self) -> None:
        """Kill all its processes at once. Its peers hear nothing of it: no FIN, no RST."""
        # Unplugged first: the dying sockets would still say goodbye.
        _try_ip("-n", self._switch, "link", "del", self._port)
        if self._guard is not None:
            if self.up:
                os.kill(self._init, signal.SIGKILL)
            self._guard.wait(_SECONDS)
            for pipe in (self._guard.stdin, self._guard.stdout):
                assert pipe is not None
                pipe.close()
            self._guard = None
        _try_ip("netns", "del", self._namespace)

    def cut(self) -> None:
        """Unplug its network cable."""
        self._set_link("down")

    def heal(self) -> None:
        """Plug it in again."""
        self._set_link("up")

    def command(self, arguments: Sequence[str]) -> list[str]:
        """Return what runs `arguments` on this node, here in the file system."""
        assert self.up, self
        entered = ("-m", "-p", "-u", "-i", "-n")
        return ["nsenter", "-t", str(self._init), *entered, "--wd=.", *arguments]

    def run(
        self, *arguments: str, environment: Mapping[str, str] | None = None, timeout: float = 60.0
    ) -> str:
        """Run a command to its end and return its output; raises CalledProcessError."""
        done = subprocess.run(
            self.command(arguments),
            env=self.environment(environment),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=timeout,
            check=False,
        )
        if done.returncode != 0:
            raise subprocess.CalledProcessError(done.returncode, arguments, done.stdout)
        return done.stdout

    def spawn(
        self, *arguments: str, output: IO[str], environment: Mapping[str, str] | None = None
    ) -> subprocess.Popen[str]:
        """Start a command; it ends with the node, or by `signal_all`."""
        return subprocess.Popen(
            self.command(arguments),
            env=self.environment(environment),
            stdout=output,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )

    def signal_all(self, process: subprocess.Popen[str], number: signal.Signals) -> None:
        """Send a signal to all of a command that `spawn` has started; it is in a session of its
        own, and the process here is only the parent of the one there.
        """
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, number)

    def environment(self, extra: Mapping[str, str] | None = None) -> dict[str, str]:
        """Return the environment of its processes."""
        return {**os.environ, "HOME": str(self.own), "TMPDIR": str(self.own), **(extra or {})}

    def _connect(self) -> None:
        inside = ("-n", self._namespace)
        _ip(*inside, "link", "set", "lo", "up")
        peer = ("peer", "name", self._port, "netns", self._switch)
        _ip("link", "add", "name", "eth0", "netns", self._namespace, "type", "veth", *peer)
        _ip("-n", self._switch, "link", "set", self._port, "master", "br0", "up")
        _ip(*inside, "addr", "add", f"{self.address}/24", "dev", "eth0")
        _ip(*inside, "link", "set", "eth0", "up")

    def _set_link(self, state: str) -> None:
        _ip("-n", self._switch, "link", "set", self._port, state)


class Nodes:
    """`with Nodes(3, folder) as nodes:` — all are up inside; afterwards nothing is left of them."""

    def __init__(self, count: int, folder: Path) -> None:
        """`folder` is for the nodes' files; see why_not."""
        prefix = f"bt{secrets.token_hex(3)}"
        self._switch = f"{prefix}sw"
        self.own = Path(tempfile.mkdtemp(prefix="bn-", dir="/tmp"))
        """On each node, its own folder; so short that Ray's sockets fit in."""
        self._nodes = tuple(
            Node(k, prefix, folder / f"node{k}", self.own) for k in range(1, count + 1)
        )

    def __repr__(self) -> str:
        return f"Nodes({', '.join(map(repr, self._nodes))})"

    def __getitem__(self, index: int) -> Node:
        """Return a node; the first is 1, as in its address."""
        return self._nodes[index - 1]

    def __len__(self) -> int:
        return len(self._nodes)

    def __enter__(self) -> Self:
        try:
            _ip("netns", "add", self._switch)
            _ip("-n", self._switch, "link", "add", "br0", "type", "bridge")
            _ip("-n", self._switch, "link", "set", "br0", "up")
            for node in self._nodes:
                node.power_on()
        except BaseException:
            self._end()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._end()

    def _end(self) -> None:
        for node in self._nodes:
            node.power_cut()
        _try_ip("netns", "del", self._switch)
        self.own.rmdir()


def _ip(*arguments: str) -> None:
    if error := _try_ip(*arguments):
        raise RuntimeError(f"ip {' '.join(arguments)}: {error}")


def _try_ip(*arguments: str) -> str:
    """Return why it failed, or an empty text."""
    done = subprocess.run(["ip", *arguments], capture_output=True, text=True, check=False)
    return done.stderr.strip() or f"exit {done.returncode}" if done.returncode else ""
