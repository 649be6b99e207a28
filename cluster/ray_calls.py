"""Every call to Ray goes through here: deadlines, and Ray's errors turned into ours."""

import asyncio
import atexit
import contextlib
import functools
import logging
import os
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent import futures
from typing import Any

from baton.cluster import ray_environment
from baton.cluster.placement import Node, Resources, Room
from baton.core.cluster_spec import RankResources
from baton.core.errors import BatonError, DeadlineExceeded, InstanceLost, InternalError, Unavailable

ray_environment.prepare()

import ray  # noqa: E402
from ray import exceptions as ray_errors  # noqa: E402
from ray._private import state as ray_state  # noqa: E402
from ray.experimental import internal_kv  # noqa: E402
from ray.util.placement_group import (  # noqa: E402
    PlacementGroup,
    get_placement_group,
    placement_group,
    placement_group_table,
    remove_placement_group,
)
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy  # noqa: E402

Actor = Any
"""A handle of a Ray actor."""
Places = PlacementGroup
"""Reserved places for processes."""
NAMESPACE = "baton"
"""Of all names in Ray: actors, placement groups and keys."""
_under_way: set["futures.Future[None]"] = set()
"""Calls that block, and have not returned."""
_HEAD_RESOURCE = "node:__internal_head__"
"""Ray's own mark of that node, of which it has 1."""
_HEAD_SHARE = 0.001
_KILL_TIMEOUT_S = 5.0
_MARGIN_S = 5.0
"""How much later than Ray's own deadline ours is."""


async def connect(address: str, timeout_s: float) -> None:
    """Make this process a driver of the Ray at `address`."""
    await _in_thread(_connect, address, timeout_s=timeout_s)


def _connect(address: str) -> None:
    ray.init(address=address, namespace=NAMESPACE, log_to_driver=False, logging_level=logging.ERROR)


async def disconnect(timeout_s: float) -> None:
    """Leave Ray; does nothing if not connected.

    Raises Unavailable after `timeout_s`; nothing else will wait for Ray then, not even the end of
    this process. So it is if a call is still waiting for an answer: leaving under its feet would
    end this process.
    """
    try:
        if calls := list(_under_way):
            await asyncio.to_thread(futures.wait, calls, timeout_s)
        if stuck := sum(not call.done() for call in calls):
            raise Unavailable(f"Ray did not answer {stuck} calls within {timeout_s:g} s")
        await _in_thread(ray.shutdown, timeout_s=timeout_s)
    except Unavailable:
        atexit.unregister(ray.shutdown)
        if any(not call.done() for call in _under_way):
            atexit.register(_end_at_once)
        raise


def abandon_calls() -> None:
    """Let what still waits in a Ray that has been ended spoil nothing: this process ends well."""
    atexit.unregister(_end_at_once)
    atexit.register(_end_at_once, 0)


def _end_at_once(status: int = 1) -> None:
    """End this process without its last steps: with a call still in there, Ray would crash."""
    if not _under_way:
        return
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


async def nodes(timeout_s: float) -> list[Node]:
    """Return the machines of the Ray cluster that are alive."""
    found: list[Node] = await _in_thread(_nodes, timeout_s=timeout_s)
    return found


def _nodes() -> list[Node]:
    free = ray_state.available_resources_per_node()  # type: ignore[no-untyped-call]
    return [
        Node(n["NodeID"], n["NodeManagerAddress"], n["Resources"], free.get(n["NodeID"], {}))
        for n in ray.nodes()  # type: ignore[no-untyped-call]
        if n["Alive"]
    ]


async def reserve(room: Room, *, node_id: str | None, name: str | None, timeout_s: float) -> Places:
    """Reserve places, if there are any on `node_id`, for the stages of one instance.

    A group with a name outlives this process. Raises Unavailable after `timeout_s`: a group for
    which there is no room stays pending without a word.
    """
    group: Places = await _in_thread(_reserve, room, node_id, name, timeout_s=timeout_s)
    return group


def _reserve(room: Room, node_id: str | None, name: str | None) -> Places:
    group: Places = placement_group(
        [dict(bundle) for bundle in room.bundles],
        strategy=room.strategy,
        name=name or "",
        lifetime="detached" if name else None,
        _soft_target_node_id=node_id,
    )
    return group


async def find_places(name: str, timeout_s: float) -> Places | None:
    """Return the places that were reserved under a name; None if there are none."""
    found: Places | None = await _in_thread(_found, get_placement_group, name, timeout_s=timeout_s)
    return found


def _found(find: Callable[..., Any], *arguments: Any) -> Any:
    """Return what `find` finds; None if it raises ValueError, as Ray's do."""
    try:
        return find(*arguments)
    except ValueError:
        return None


async def await_places(group: Places, timeout_s: float) -> list[str]:
    """Wait until places are there; return the node of each. Unavailable after `timeout_s`."""
    ready = await _in_thread(group.wait, timeout_s, timeout_s=timeout_s + _MARGIN_S)
    if not ready:
        raise Unavailable(f"Ray found no room in {timeout_s:g} s")
    table = await _in_thread(placement_group_table, group, timeout_s=_MARGIN_S)
    return [table["bundles_to_node_id"][i] for i in range(group.bundle_count)]


async def release(group: Places, timeout_s: float) -> None:
    """Give places back."""
    await _in_thread(remove_placement_group, group, timeout_s=timeout_s)


async def request_resources(bundles: Sequence[Resources], timeout_s: float) -> None:
    """Ask Ray's autoscaler, if it has one, for nodes that hold all of this; empty: for nothing.

    It stands until it is asked for something else. What runs already counts as well: it is to be
    among `bundles`.
    """
    await _in_thread(_request_resources, [dict(b) for b in bundles], timeout_s=timeout_s)


def _request_resources(bundles: list[dict[str, float]]) -> None:
    from ray.autoscaler import sdk

    sdk.request_resources(bundles=bundles)


async def create_actor(
    cls: type,
    *arguments: Any,
    group: Places,
    place: int,
    resources: RankResources,
    name: str | None,
    concurrency: int,
    timeout_s: float,
) -> Actor:
    """Start an actor of `cls` in one place of a group; it runs `concurrency` calls at once.

    One with a name outlives this process. It is never restarted by Ray: plan.py decides that.
    Raises Unavailable after `timeout_s`: Ray blocks until its head answers, which a head that is
    going down does not.
    """
    remote: Any = _exported(cls).options(
        num_cpus=resources.cpus,
        num_gpus=resources.gpus,
        resources=resources.custom,
        name=name,
        lifetime="detached" if name else None,
        max_restarts=0,
        max_task_retries=0,
        max_concurrency=concurrency,
        scheduling_strategy=PlacementGroupSchedulingStrategy(
            placement_group=group, placement_group_bundle_index=place
        ),
    )
    return await _in_thread(remote.remote, *arguments, timeout_s=timeout_s)


async def create_service(
    cls: type,
    *arguments: Any,
    name: str,
    concurrency: int,
    restarts: int,
    timeout_s: float,
    beside_head: bool = False,
    node_resource: str = "",
) -> Actor:
    """Start a named actor of `cls` that outlives this process, on any node; it takes no CPU.

    Ray starts it again up to `restarts` times; -1: always. `beside_head`: on the node of Ray's
    head and nowhere else, also if the head comes back as another node. `node_resource`: on a node
    with that resource, of which it takes 1.
    """
    taken = {_HEAD_RESOURCE: _HEAD_SHARE} if beside_head else {}
    if node_resource:
        taken[node_resource] = 1.0
    remote: Any = _exported(cls).options(
        num_cpus=0,
        memory=1,  # a byte by Ray's books: what takes nothing is not spread, but put anywhere
        resources=taken,
        name=name,
        lifetime="detached",
        max_restarts=restarts,
        max_task_retries=0,
        max_concurrency=concurrency,
        scheduling_strategy="SPREAD",
    )
    return await _in_thread(remote.remote, *arguments, timeout_s=timeout_s)


async def find_actor(name: str, timeout_s: float) -> Actor:
    """Return the actor of a name; raises InstanceLost if there is none."""
    actor = await _in_thread(_found, ray.get_actor, name, NAMESPACE, timeout_s=timeout_s)
    if actor is None:
        raise InstanceLost(f"there is no actor {name}")
    return actor


async def put_value(key: str, value: str, timeout_s: float) -> None:
    """Write a value where it lasts as long as Ray's head, or its Redis."""
    arguments = (key.encode(), value.encode(), True)
    put = functools.partial(internal_kv._internal_kv_put, *arguments, namespace=NAMESPACE.encode())
    await _in_thread(put, timeout_s=timeout_s)


async def get_value(key: str, timeout_s: float) -> str | None:
    """Return what was written last; None if nothing was."""
    get = functools.partial(
        internal_kv._internal_kv_get, key.encode(), namespace=NAMESPACE.encode()
    )
    found: bytes | None = await _in_thread(get, timeout_s=timeout_s)
    return None if found is None else found.decode()


async def delete_value(key: str, timeout_s: float) -> None:
    """Forget a value."""
    delete = functools.partial(
        internal_kv._internal_kv_del, key.encode(), namespace=NAMESPACE.encode()
    )
    await _in_thread(delete, timeout_s=timeout_s)


@functools.cache
def _exported(cls: type) -> Any:
    """Return the actor class; the same one each time, so that its code goes to Ray only once."""
    return ray.remote(cls)


async def call(actor: Actor, method: str, *arguments: Any, timeout_s: float | None = None) -> Any:
    """Call a method of an actor and return its result.

    Raises what the method raised if that is a BatonError, InternalError for anything else,
    InstanceLost if the actor dies, or is dead, or None, DeadlineExceeded after `timeout_s`,
    Unavailable if Ray fails or is not connected.
    """
    if actor is None:
        raise InstanceLost("it has no process")
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
            await end(actor)


async def end(actor: Actor) -> None:
    """End an actor's process at once, for good; raises Unavailable if Ray does not take note."""
    await _in_thread(lambda: ray.kill(actor, no_restart=True), timeout_s=_KILL_TIMEOUT_S)


async def start_again(actor: Actor) -> None:
    """End an actor's process, and let Ray start it again if that was agreed; raises as `end`.

    Ray asks the process first: one that is stopped has about five seconds more.
    """
    await _in_thread(lambda: ray.kill(actor, no_restart=False), timeout_s=_KILL_TIMEOUT_S)


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
        try:
            return done.result()
        except (ray_errors.RayError, ConnectionError):
            raise
        except Exception as error:  # Ray's own calls raise what comes to hand
            raise Unavailable(f"Ray failed: {error}") from None


def _start_thread(function: Callable[..., Any], *arguments: Any) -> "asyncio.Future[Any]":
    loop = asyncio.get_running_loop()
    done: asyncio.Future[Any] = loop.create_future()

    returned: futures.Future[None] = futures.Future()
    _under_way.add(returned)
    returned.add_done_callback(_under_way.discard)

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
        returned.set_result(None)
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
