"""The harness of nodes itself: they are hosts of their own, and can be cut off."""

import os
import select
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from .nodes import Nodes, why_not

pytestmark = pytest.mark.skipif(why_not() is not None, reason=str(why_not()))

PYTHON = sys.executable
BOOT = "/proc/sys/kernel/random/boot_id"
TALK = """
import socket, sys
server, seconds = sys.argv[1], float(sys.argv[2])
try:
    with socket.create_connection((server, 7000), seconds) as peer:
        print(peer.makefile().readline().strip())
except OSError:
    print("unreachable")
"""
SERVE = """
import socket
with socket.create_server(("0.0.0.0", 7000)) as listener:
    print("listening", flush=True)
    while True:
        with listener.accept()[0] as peer:
            peer.sendall(socket.gethostname().encode() + b"\\n")
"""


@pytest.fixture(scope="module")
def nodes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Nodes]:
    with Nodes(2, tmp_path_factory.mktemp("nodes")) as nodes:
        yield nodes


def ask(nodes: Nodes, asking: int, seconds: float) -> str:
    return nodes[asking].run(PYTHON, "-c", TALK, nodes[3 - asking].address, str(seconds)).strip()


def serve(nodes: Nodes, index: int, log: Path) -> subprocess.Popen[str]:
    with log.open("w") as output:
        process = nodes[index].spawn(PYTHON, "-c", SERVE, output=output)
    while "listening" not in log.read_text():
        assert process.poll() is None, log.read_text()
    return process


def test_a_node_has_its_own_name_processes_files_and_boot_id(nodes: Nodes) -> None:
    seen = [
        nodes[k].run(
            "sh", "-c", f"hostname; touch {nodes.own}/mine; ls {nodes.own}; echo $$; cat {BOOT}"
        )
        for k in (1, 2)
    ]
    names = [text.splitlines() for text in seen]
    assert names[0][0] == "node1"
    assert names[1][0] == "node2"
    assert all(lines[1] == "mine" and int(lines[2]) < 1000 for lines in names)
    assert names[0][3] != names[1][3]


def test_a_cut_node_is_not_reached_until_it_is_healed(nodes: Nodes, tmp_path: Path) -> None:
    serving = serve(nodes, 2, tmp_path / "log")
    assert ask(nodes, 1, 10) == "node2"
    nodes[2].cut()
    assert ask(nodes, 1, 0.3) == "unreachable"
    nodes[2].heal()
    assert ask(nodes, 1, 30) == "node2"
    nodes[2].signal_all(serving, signal.SIGKILL)
    serving.wait(20)


def test_a_power_cut_ends_all_and_power_brings_an_empty_host(nodes: Nodes, tmp_path: Path) -> None:
    serving = serve(nodes, 2, tmp_path / "log")
    nodes[2].run("touch", f"{nodes.own}/was-here")
    nodes[2].power_cut()
    assert serving.wait(20) != 0
    assert not nodes[2].up
    nodes[2].power_on()
    assert nodes[2].run("ls", str(nodes.own)) == ""
    assert ask(nodes, 1, 0.3) == "unreachable"


def test_orphans_are_reaped(nodes: Nodes) -> None:
    nodes[1].run("sh", "-c", "(sleep 0.05 &) ; true")
    zombies = "for s in /proc/[0-9]*/stat; do cut -d' ' -f3 $s; done 2>/dev/null"
    while "Z" in nodes[1].run("sh", "-c", zombies):
        pass


def test_nothing_is_left_of_nodes(tmp_path: Path) -> None:
    with Nodes(1, tmp_path) as nodes:
        process = nodes[1].spawn("sleep", "1000", output=(tmp_path / "log").open("w"))
        names = repr(nodes)
    assert process.wait(20) != 0
    listed = subprocess.run(["ip", "netns", "list"], capture_output=True, text=True, check=True)
    assert nodes._switch not in listed.stdout, names
    assert not nodes.own.exists()


START = """
import sys
from pathlib import Path
from tests.cluster.nodes import Nodes
with Nodes(1, Path(sys.argv[1])) as nodes:
    print(nodes[1]._init, nodes[1]._namespace, nodes._switch, nodes.own, flush=True)
    sys.stdin.read()
"""


def test_nodes_end_with_whoever_has_started_them(tmp_path: Path) -> None:
    starter = subprocess.Popen(
        [PYTHON, "-c", START, str(tmp_path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=Path(__file__).parents[2],
    )
    assert starter.stdout is not None
    init, namespace, switch, own = starter.stdout.readline().split()
    ended = os.pidfd_open(int(init))
    try:
        starter.kill()
        assert select.select([ended], [], [], 60)[0], "the node lives on"
    finally:
        os.close(ended)
        starter.communicate()
        for name in (namespace, switch):
            subprocess.run(["ip", "netns", "del", name], check=True)
        Path(own).rmdir()
