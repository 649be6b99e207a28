"""What bounds an engine: how fast memory is read, and what its scheduler costs per step."""

import statistics
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import torch
from micro_scheduler import measure, measure_cache

READ_BYTES = 2 << 30
"""Over any cache."""
READS = 4
SEQUENCES = (1, 16, 64, 256, 1024)
CACHED_BLOCKS = 100_000


def read_bandwidth(threads: int) -> float:
    """Return bytes per second of plain reads by `threads` threads, the best of a few."""
    parts = torch.ones(READ_BYTES // 4).chunk(threads)
    ready = threading.Barrier(threads)

    def read(part: torch.Tensor) -> float:
        torch.set_num_threads(1)
        ready.wait(60)
        began = time.perf_counter()
        for _ in range(READS):
            part.sum()
        return time.perf_counter() - began

    best = 0.0
    with ThreadPoolExecutor(threads) as pool:
        for _ in range(READS):
            seconds = max(pool.map(read, parts))
            best = max(best, READS * READ_BYTES / seconds)
    return best


def scheduler_tables() -> str:
    """Return microseconds per step by running sequences, and per prompt in a full prefix cache."""
    lines = ["### Scheduler", "", "| running sequences | plan µs | apply µs | µs per sequence |"]
    lines.append("|---|---|---|---|")
    for sequences in SEQUENCES:
        plan, apply = (1e6 * statistics.median(t) for t in measure(sequences, 512, 100))
        each = (plan + apply) / sequences
        lines.append(f"| {sequences} | {plan:.0f} | {apply:.0f} | {each:.2f} |")
    lines += ["", f"| prompt, {CACHED_BLOCKS:,} blocks cached | found | plan µs | apply µs |"]
    lines.append("|---|---|---|---|")
    for prompt in (512, 2048, 8192):
        rows = measure_cache(CACHED_BLOCKS, prompt, rounds=5)
        for found in (rows[0::2], rows[1::2]):
            plan = 1e6 * statistics.median(row.plan for row in found)
            apply = 1e6 * statistics.median(row.apply for row in found)
            lines.append(f"| {prompt} | {found[0].hit} | {plan:.0f} | {apply:.0f} |")
    return "\n".join(lines)
