"""How fast the router decides, and what its index costs: `python -m bench.router`.

An index of ten million blocks is filled by the events of as many holders as there are instances,
half of them prefill and half decode; then requests are routed, whose prompts begin with what is
indexed. One process, one thread; no network: what a gateway adds is measured by bench/gateway.py.
Times are those of the CPU, so that other work on the machine counts for little.
"""

import argparse
import statistics
import time
from random import Random
from typing import NamedTuple

import numpy as np

from baton.core.hashing import chain_hashes, prefix_root
from baton.core.ids import Incarnation, InstanceId
from baton.core.instance_events import BlockChanges, CacheTerms, InstanceLoad
from baton.core.topology import InstanceInfo, Membership, Role
from baton.router.block_table import keys_of
from baton.router.load import key_of
from baton.router.router import Hint, Router
from baton.router.state import RouterState

BLOCK_SIZE = 16
TERMS = CacheTerms(BLOCK_SIZE, "xxh3_128", local_prefill=True)


class Row(NamedTuple):
    """One line of the table."""

    instances: int
    prompt: int
    decisions_s: float
    p50_us: float
    p99_us: float
    hashing_us: float
    """Of one decision: the chained hashes of the prompt."""


def fleet(count: int) -> Membership:
    """Return half prefill, half decode instances."""
    instances = tuple(
        InstanceInfo(
            instance_id=InstanceId(f"instance-{n}"),
            role=Role.PREFILL if n % 2 else Role.DECODE,
            address="127.0.0.1:1",
            incarnation=Incarnation(n + 1),
            pid=1,
            model="m",
            compatibility="same",
            max_model_len=1 << 20,
            kv_tokens=1 << 20,
            max_sequences=256,
            load_s=0.0,
        )
        for n in range(count)
    )
    return Membership(1, instances)


def fill(state: RouterState, membership: Membership, blocks: int, batch: int) -> float:
    """Tell of `blocks` random blocks in messages of `batch`; return events applied per second."""
    rng = np.random.default_rng(0)
    counts = dict.fromkeys(map(key_of, membership.instances), 0)
    for key in counts:
        state.opened(key, TERMS)
        state.changed(key, BlockChanges(0, 0, 0, True, b"", b""))
    keys, spent_s = list(counts), 0.0
    for number in range(blocks // batch):
        key = keys[number % len(keys)]
        stored = rng.bytes(8 * batch)
        change = BlockChanges(0, counts[key], batch, False, stored, b"")
        began = time.thread_time()
        assert state.changed(key, change)
        spent_s += time.thread_time() - began
        counts[key] += batch
    return blocks / spent_s


def tell_loads(state: RouterState, membership: Membership, rng: Random) -> None:
    """Let all instances tell some load."""
    for instance in membership.instances:
        load = InstanceLoad(rng.randrange(4000), rng.randrange(64), rng.randrange(60_000), 900_000)
        state.told(key_of(instance), load)


def decide(state: RouterState, membership: Membership, prompt_tokens: int, count: int) -> Row:
    """Route `count` requests, 32 of which are open at a time."""
    rng = Random(1)
    tell_loads(state, membership, rng)
    router = Router(max_open_requests=64, state=state, salt="bench", rng=rng)
    prompts = [tuple(rng.randrange(50_000) for _ in range(prompt_tokens)) for _ in range(32)]
    keys = [keys_of(chain_hashes(p, BLOCK_SIZE, prefix_root(""))) for p in prompts]
    for number, instance in enumerate(membership.instances[:64]):
        holder = state._followed[key_of(instance)].holders[0]
        for chain in keys[number % 32 :: 32]:
            state.index.stored(holder, chain)
    times, open_leases = [], []
    for number in range(count):
        prompt = prompts[number % 32]
        began = time.thread_time()
        lease = router.admit(
            membership,
            prompt_tokens=prompt_tokens,
            max_tokens=256,
            hint=Hint(f"request-{number}", prompt, "", f"session-{number % 500}"),
        )
        times.append(time.thread_time() - began)
        open_leases.append(lease)
        if len(open_leases) > 32:
            open_leases.pop(0).close()
    began = time.thread_time()
    for prompt in prompts:
        chain_hashes(prompt, BLOCK_SIZE, prefix_root(""))
    hashing_s = (time.thread_time() - began) / len(prompts)
    times.sort()
    return Row(
        len(membership.instances),
        prompt_tokens,
        1 / statistics.mean(times),
        1e6 * times[len(times) // 2],
        1e6 * times[int(0.99 * len(times))],
        1e6 * hashing_s,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--blocks", type=int, default=10_000_000)
    parser.add_argument("--decisions", type=int, default=3000)
    options = parser.parse_args()
    print("| instances | prompt tokens | decisions/s | p50 us | p99 us | of it hashing us |")
    print("|---|---|---|---|---|---|")
    for count in (100, 1000):
        state, membership = RouterState(options.blocks), fleet(count)
        events_s = fill(state, membership, options.blocks, 4096)
        for prompt in (512, 2048, 8192):
            row = decide(state, membership, prompt, options.decisions)
            print("| " + " | ".join(f"{value:,.0f}" for value in row) + " |", flush=True)
        stats = state.index.stats()
        few_s = fill(state, membership, min(options.blocks, 500_000), 64)
        key, portions, most_s = key_of(membership.instances[0]), 0, 0.0
        state.lost(key)
        more = True
        while more:
            began = time.thread_time()
            more = state.index.sweep()
            most_s, portions = max(most_s, time.thread_time() - began), portions + 1
        print(
            f"\n{count} instances: {stats.blocks:,} blocks held, {stats.evicted:,} lost,"
            f" {stats.nbytes / options.blocks:.2f} bytes per block; events applied per second:"
            f" {events_s:,.0f} in messages of 4,096, {few_s:,.0f} of 64; an instance that left is"
            f" swept out in {portions} portions of at most {1e3 * most_s:.1f} ms\n"
        )


if __name__ == "__main__":
    main()
