"""Every call to Ray goes through here: deadlines, and Ray's errors turned into ours.

Importing this module sets Ray's environment for this process, which Ray reads when it is imported.
"""

import asyncio
import atexit
import contextlib
import functools
import logging
import os
import secrets
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from baton.core.errors import BatonError, DeadlineExceeded, InstanceLost, InternalError, Unavailable

ENVIRONMENT = {
    # Only we may use our Ray: without a token, whoever reaches its ports runs code as us.
    "RAY_AUTH_MODE": "token",
    "RAY_AUTH_TOKEN": secrets.token_hex(32),
    # On Linux, Ray replaces 127.0.0.1 by the address of a network card unless this is off.
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_START_HOOK": "baton.cluster.head_process.without_client_server",
    # Ray would kill instances when the machine's memory is scarce, also if others took it.
    "RAY_memory_monitor_refresh_ms": "0",
    # We close instances ourselves, before Ray ends; it need not wait for them.
    "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S": "0",
    # It would print a paragraph of its own when an instance dies, which we report already.
    "RAY_DEDUP_LOGS_SKIP_REGEX": ".",
    # A call after we have left Ray is an error; it would start another Ray, and wait for it.
    "RAY_ENABLE_AUTO_CONNECT": "0",
}
"""For the driver, the head and every worker alike: they must agree."""
_DROPPED = ("RAY_ADDRESS", "RAY_AUTH_TOKEN_PATH", "RAY_NAMESPACE", "RAY_JOB_CONFIG_JSON_ENV_VAR")


for _name in _DROPPED:
    os.environ.pop(_name, None)
os.environ.update(ENVIRONMENT)

import ray  # noqa: E402
from ray import exceptions as ray_errors  # noqa: E402
from ray.util.placement_group import (  # noqa: E402
    PlacementGroup,
    placement_group,
    remove_placement_group,
)
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy  # noqa: E402

Actor = Any
"""A handle of a Ray actor."""
Places = PlacementGroup
"""Reserved places for processes."""
_KILL_TIMEOUT_S = 5.0
_MARGIN_S = 5.0
"""How much later than Ray's own deadline ours is."""


def head_environment(threads: int) -> dict[str, str]:
    """Return the environment of the head, which Ray's workers inherit."""
    numbers = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS"), str(threads))
    return {**os.environ, **ENVIRONMENT, **numbers}


async def connect(address: str, timeout_s: float) -> None:
    """Make this process a driver of the Ray at `address`."""
    await _in_thread(_connect, address, timeout_s=timeout_s)


def _connect(address: str) -> None:
    ray.init(address=address, namespace="baton", log_to_driver=False, logging_level=logging.ERROR)


async def disconnect(timeout_s: float) -> None:
    """Leave Ray; does nothing if not connected.

    Raises Unavailable after `timeout_s`; nothing else will wait for Ray then, not even the end of
    this process.
    """
    try:
        await _in_thread(ray.shutdown, timeout_s=timeout_s)
    except Unavailable:
        atexit.unregister(ray.shutdown)
        raise


async def reserve_places(sizes: Sequence[int], timeout_s: float) -> Places:
    """Reserve places, each on one node, for so many processes each.

    Raises Unavailable after `timeout_s`, with what is there: an impossible group stays pending
    without a word.
    """
    reserved: Places | str = await _in_thread(
        _reserve_places, sizes, timeout_s, timeout_s=timeout_s + _MARGIN_S
    )
    if isinstance(reserved, str):
        wanted = f"{sum(sizes)} processes, {' and '.join(map(str, sizes))} together on a node"
        raise Unavailable(f"Ray found no room in {timeout_s:g} s for {wanted}; {reserved}")
    return reserved


def _reserve_places(sizes: Sequence[int], timeout_s: float) -> Places | str:
    """Return the places, or what there is instead."""
    group: Places = placement_group([{"CPU": size} for size in sizes], strategy="PACK")
    if group.wait(timeout_s):
        return group
    remove_placement_group(group)
    nodes = ray.nodes()  # type: ignore[no-untyped-call]
    rooms = [int(node["Resources"].get("CPU", 0)) for node in nodes if node["Alive"]]
    return f"its nodes have room for {' and '.join(map(str, rooms))}, if nothing else is there"


async def create_actor(
    cls: type, *arguments: Any, group: Places, place: int, concurrency: int, timeout_s: float
) -> Actor:
    """Start an actor of `cls` in one place of a group; it runs `concurrency` calls at once.

    It is never restarted by Ray: reconcile.py decides that. Raises Unavailable after `timeout_s`:
    Ray blocks until its head answers, which a head that is going down does not.
    """
    remote: Any = _exported(cls).options(
        num_cpus=1,
        max_restarts=0,
        max_task_retries=0,
        max_concurrency=concurrency,
        scheduling_strategy=PlacementGroupSchedulingStrategy(
            placement_group=group, placement_group_bundle_index=place
        ),
    )
    return await _in_thread(remote.remote, *arguments, timeout_s=timeout_s)


@functools.cache
def _exported(cls: type) -> Any:
    """Return the actor class; the same one each time, so that its code goes to Ray only once."""
    return ray.remote(cls)


async def call(actor: Actor, method: str, *arguments: Any, timeout_s: float | None = None) -> Any:
    """Call a method of an actor and return its result.

    Raises what the method raised if that is a BatonError, InternalError for anything else,
    InstanceLost if the actor is dead or dies, DeadlineExceeded after `timeout_s`, Unavailable if
    Ray fails or is not connected.
    """
    if not ray.is_initialized():
        raise Unavailable("Ray is not connected")
    with _errors_ours():
        reference = getattr(actor, method).remote(*arguments)
        try:
            async with asyncio.timeout(timeout_s):
                return await asyncio.wrap_future(reference.future())
        except TimeoutError:
            message = f"no answer through Ray within {timeout_s:g} s"
            raise DeadlineExceeded(message) from None


async def kill(actor: Actor) -> None:
    """End an actor's process at once; does nothing if it is dead already, or if Ray is."""
    if ray.is_initialized():
        with contextlib.suppress(Unavailable):
            await _in_thread(lambda: ray.kill(actor, no_restart=True), timeout_s=_KILL_TIMEOUT_S)


async def _in_thread(function: Callable[..., Any], *arguments: Any, timeout_s: float) -> Any:
    """Run a call that blocks; raises Unavailable if Ray fails, or after `timeout_s`.

    A call that never returns keeps nobody waiting: its thread is a daemon, which the end of the
    process does not wait for, unlike the threads of asyncio.to_thread.
    """
    done = _start_thread(function, *arguments)
    try:
        await asyncio.wait({done}, timeout=timeout_s)
    except asyncio.CancelledError:
        # Let it finish while Ray still answers: what comes next may end Ray.
        await asyncio.wait({done}, timeout=timeout_s)
        raise
    if not done.done():
        done.cancel()
        raise Unavailable(f"Ray did not answer within {timeout_s:g} s")
    with _errors_ours():
        return done.result()


def _start_thread(function: Callable[..., Any], *arguments: Any) -> "asyncio.Future[Any]":
    loop = asyncio.get_running_loop()
    done: asyncio.Future[Any] = loop.create_future()

    def report(result: Any, error: BaseException | None) -> None:
        if done.done():
            return
        if error is None:
            done.set_result(result)
        else:
            done.set_exception(error)

    def work() -> None:
        result, raised = None, None
        try:
            result = function(*arguments)
        except BaseException as error:  # whatever it is, it belongs to who waits
            raised = error
        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits any more
            loop.call_soon_threadsafe(report, result, raised)

    threading.Thread(target=work, name="ray-call", daemon=True).start()
    return done


@contextlib.contextmanager
def _errors_ours() -> Iterator[None]:
    """Let no error of Ray out."""
    try:
        yield
    except ray_errors.RayError as error:
        raise _ours(error) from None
    except ConnectionError as error:
        raise Unavailable(f"Ray cannot be reached: {error}") from None


def _ours(error: ray_errors.RayError) -> BatonError:
    """Turn an error of Ray into ours."""
    if isinstance(error, ray_errors.RayTaskError):
        cause = error.cause
        return cause if isinstance(cause, BatonError) else InternalError(str(error))
    if isinstance(error, ray_errors.RayActorError):
        return InstanceLost("its process ended")
    return Unavailable(f"Ray failed: {error}")
