"""Finding, ending and outliving processes, with real ones."""

import signal
import subprocess
import sys

from baton.cluster.processes import send_signal, session_members, wait_gone

# A leader whose child loses it: the orphan stays in the session.
TREE = """
import os, sys, time
if os.fork() == 0:
    print(os.getpid(), flush=True)
    time.sleep(60)
sys.stdin.read()
"""


def start_tree() -> tuple["subprocess.Popen[str]", int]:
    leader = subprocess.Popen(
        [sys.executable, "-c", TREE],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    assert leader.stdout is not None
    return leader, int(leader.stdout.readline())


async def test_an_orphan_is_found_and_ended() -> None:
    leader, child = start_tree()
    with leader:
        assert set(session_members(leader.pid)) == {leader.pid, child}
        assert leader.stdin is not None
        leader.stdin.close()  # which ends it
        leader.wait()
        assert set(session_members(leader.pid)) == {child}
        left = session_members(leader.pid)
        send_signal(left, signal.SIGKILL)
        await wait_gone(left, 10.0)
        assert session_members(leader.pid) == {}


async def test_waiting_has_a_deadline() -> None:
    leader, child = start_tree()
    with leader:
        await wait_gone([child], 0.05)
        assert child in session_members(leader.pid)
        send_signal(session_members(leader.pid), signal.SIGKILL)
        await wait_gone([leader.pid, child], 10.0)


def test_a_pid_that_was_given_to_another_process_is_spared() -> None:
    leader, child = start_tree()
    with leader:
        wrong = {pid: began - 1 for pid, began in session_members(leader.pid).items()}
        send_signal(wrong, signal.SIGKILL)
        assert set(session_members(leader.pid)) == {leader.pid, child}
        send_signal(session_members(leader.pid), signal.SIGKILL)


async def test_processes_that_are_gone_are_no_trouble() -> None:
    leader, _ = start_tree()
    with leader:
        members = session_members(leader.pid)
        send_signal(members, signal.SIGKILL)
        await wait_gone(members, 10.0)
        leader.wait()
        send_signal(members, signal.SIGKILL)
        await wait_gone(members, 10.0)
