"""Draws where each request was, and when: prefill, wire and decode on one time axis."""

from collections.abc import Sequence

from rich.console import Console
from rich.text import Text

from baton.cli.demo.record import Record
from baton.cli.demo.screen import COLOURS, heading

CHART = 56
"""Columns of the time axis."""
_LABEL = 12
WAIT, COMPUTE, READ, LATE, DECODE = "░", "█", "▪", "▮", "━"
LEGEND = (
    f"{WAIT} waiting   {COMPUTE} computing the prompt   {READ} KV of a chunk is read"
    f"   {DECODE} tokens stream"
)


class Axis:
    """Seconds to columns."""

    def __init__(self, end_s: float) -> None:
        self.end_s = max(end_s, 1e-3)

    def column(self, seconds: float) -> int:
        """Return the column that holds an instant, from 0 to CHART - 1."""
        return max(0, min(CHART - 1, int(seconds / self.end_s * CHART)))

    def lane(self, *parts: tuple[float, float, str]) -> str:
        """Return a lane with (begin, end, character) parts; each shows, however short it is."""
        cells = [" "] * CHART
        for begin, end, character in parts:
            first = self.column(begin)
            for i in range(first, max(first, self.column(end)) + 1):
                cells[i] = character
        return "".join(cells)


def draw(console: Console, records: Sequence[Record]) -> None:
    """Print the timelines of all requests."""
    axis = Axis(max(record.arrivals[-1] for record in records))
    console.print(_ruler(axis))
    for index, record in enumerate(records):
        colour = COLOURS[index % len(COLOURS)]
        console.print(Text(heading(index, record), style=f"bold {colour}"))
        for label, lane, note in lanes(axis, record):
            line = Text(f"  {label:<{_LABEL - 2}}") + Text(lane, style=colour)
            console.print(line + Text(f"  {note}", style="dim"), no_wrap=True)
    console.print(f"{'':{_LABEL}}{LEGEND}", style="dim")


def lanes(axis: Axis, record: Record) -> list[tuple[str, str, str]]:
    """Return (label, lane, note) for each process and for the wire between them."""
    first, last = record.arrivals[0], record.arrivals[-1]
    decode = record.trace["decode_instance"]
    streaming = (decode, axis.lane((first, last, DECODE)), f"{record.output_tokens} tokens")
    found = record.handover
    if not found:
        return [streaming]
    prefill = axis.lane(
        (record.sent, record.compute_begins, WAIT),
        (record.compute_begins, record.compute_ends, COMPUTE),
    )
    moved = f"{found['blocks']} blocks, {size(found['bytes'])}"
    return [
        (found["prefill_instance"], prefill, f"{record.prompt_tokens} tokens"),
        ("wire", axis.lane(*_reads(record)), moved),
        streaming,
    ]


def _reads(record: Record) -> list[tuple[float, float, str]]:
    """Return a mark per chunk: it is read as soon as it is computed.

    The trace tells how many chunks there were and not when each was ready; they are of one size,
    and so they are drawn at equal distances.
    """
    chunks = max(1, int(record.handover["chunks"]))
    step = (record.compute_ends - record.compute_begins) / chunks
    ends = [record.compute_begins + step * (i + 1) for i in range(chunks)]
    return [(end, end, READ) for end in ends]


def _ruler(axis: Axis) -> Text:
    marks = [" "] * CHART
    for fourth in range(4):
        label = f"{axis.end_s * fourth / 4:.1f} s"
        place = CHART * fourth // 4
        marks[place : place + len(label)] = label
    end = f"{axis.end_s:.1f} s"
    return Text(" " * _LABEL + "".join(marks)[: CHART - len(end)] + end, style="dim")


def size(number: int) -> str:
    """Return bytes for people."""
    return f"{number / 1e6:.1f} MB" if number >= 1e5 else f"{number / 1e3:.1f} kB"
