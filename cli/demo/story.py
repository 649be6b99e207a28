"""Says in figures, and then in sentences, where the time went. Everything is measured."""

import itertools
from collections.abc import Iterator, Sequence

from rich.console import Console
from rich.table import Table

from baton.cli.demo.record import Record
from baton.cli.demo.screen import COLOURS
from baton.cli.demo.timeline import size
from baton.core.topology import InstanceInfo

COLUMNS = (
    ("#", 2),
    ("tokens in/out", 13),
    ("queue", 8),
    ("prefill", 9),
    ("KV handed over", 22),
    ("hidden", 7),
    ("exposed", 8),
    ("TTFT", 8),
    ("TPOT", 8),
)


def print_table(console: Console, records: Sequence[Record]) -> None:
    """Print one line per request: the stations of its way, in order."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    for title, width in COLUMNS:
        table.add_column(title, width=width, justify="right", no_wrap=True)
    for index, record in enumerate(records):
        table.add_row(*row(index, record), style=COLOURS[index % len(COLOURS)])
    console.print(table)
    console.print(
        "queue, prefill: in the prefill process · hidden: share of the transfer during which"
        " prefill\nstill computed · exposed: the rest, which delays the first token"
        " · TTFT: time to first token ·\nTPOT: time per output token after it",
        style="dim",
    )


def row(index: int, record: Record) -> tuple[str, ...]:
    """Return the cells of one request."""
    found, trace = record.handover, record.trace
    tokens = f"{record.prompt_tokens} / {record.output_tokens}"
    ends = (_ms(trace["ttft_s"]), _ms(trace["tpot_s"]))
    if not found:
        return (str(index + 1), tokens, "-", "-", "none: computed in place", "-", "-", *ends)
    return (
        str(index + 1),
        tokens,
        _ms(found["queue_s"]),
        _ms(found["compute_s"]),
        f"{found['blocks']} blocks {size(found['bytes'])}",
        f"{found['overlapped']:.0%}",
        _ms(found["exposed_s"]),
        *ends,
    )


def sentences(records: Sequence[Record], instances: Sequence[InstanceInfo]) -> Iterator[str]:
    """Yield what the figures mean, in plain words."""
    handed = [record for record in records if record.handover]
    if handed:
        yield _who(records, handed, instances)
        yield _undisturbed(max(handed, key=lambda r: r.prompt_tokens), records)
        yield _transfer(handed)


def _who(
    records: Sequence[Record], handed: Sequence[Record], instances: Sequence[InstanceInfo]
) -> str:
    pids = {str(i.instance_id): i.pid for i in instances}
    prompts = sum(record.prompt_tokens for record in handed)
    outputs = sum(record.output_tokens for record in records)
    prefill = handed[0].handover["prefill_instance"]
    decode = handed[0].trace["decode_instance"]
    rest = "it computed no prompt" if len(handed) == len(records) else "it computed the others"
    return (
        f"{prefill} (pid {pids.get(prefill, '?')}) computed {len(handed)} prompts of {prompts:,}"
        f" tokens. {decode} (pid {pids.get(decode, '?')}) streamed {outputs:,} tokens; {rest}."
    )


def _undisturbed(longest: Record, records: Sequence[Record]) -> str:
    """Tell what the other streams did while the longest prompt was computed."""
    begin, end = longest.compute_begins, longest.compute_ends
    others = [record for record in records if record is not longest]
    pieces = sum(begin <= at <= end for record in others for at in record.arrivals)
    gap = max((_longest_gap(record.arrivals, begin, end) for record in others), default=0.0)
    busy = f"The longest prompt kept the prefill process busy for {_ms(end - begin)}."
    if not pieces:
        return busy + " No other request was streaming just then."
    return (
        f"{busy} In that time the other requests received {pieces} pieces of text, and none of"
        f" their streams paused for more than {_ms(gap)}. Inside one process that prompt would"
        " have stood between their tokens."
    )


def _longest_gap(arrivals: Sequence[float], begin: float, end: float) -> float:
    """Return the longest time between two pieces of one stream that touches [begin, end]."""
    pairs = itertools.pairwise(arrivals)
    return max((b - a for a, b in pairs if b >= begin and a <= end), default=0.0)


def _transfer(handed: Sequence[Record]) -> str:
    moved = sum(record.handover["bytes"] for record in handed)
    spent = sum(record.handover["transfer_s"] for record in handed)
    exposed = sum(record.handover["exposed_s"] for record in handed)
    ways = sorted({record.handover["transport"] for record in handed} - {"", "none"})
    how = f" {' and '.join(map(_carrier, ways))}" if ways else ""
    return (
        f"The prompts' KV, {size(moved)}, was read from the one process into the other{how}."
        f" That took {_ms(spent)} in all, of which {_ms(spent - exposed)} were"
        f" hidden behind prefill's computing; first tokens waited {_ms(exposed / len(handed))} for"
        " it on average."
    )


def _carrier(transport: str) -> str:
    """Say what carried bytes; for the names see TransportReport in kv_transfer/transport.py."""
    match transport:
        case "shm":
            return "through shared memory (shm)"
        case "shm-cma":
            return "by the kernel (shm-cma)"
        case "tcp":
            return "over TCP (tcp)"
        case _:
            return f"by UCX over {transport}"


def _ms(seconds: float) -> str:
    return (
        f"{seconds:.2f} s" if seconds >= 1 else f"{seconds * 1e3:.{0 if seconds > 0.1 else 1}f} ms"
    )
