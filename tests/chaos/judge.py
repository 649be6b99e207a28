"""The first oracle: what is wrong with the answers of a run, judged from the records alone."""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from baton.proto import worker_pb2 as pb

from .gateway import Answer, Gateway
from .schedule import ON_DECODE, WRONG_BYTES, Ask, Schedule

_MAKE_READS_LATE = frozenset(
    {"pause", "pause_decode", "freeze", "slow", "late", "hang", "kill", "drain"}
)
"""After these, prefill may rightly have given up the blocks that are being read."""

_LATE_S = 2.0
"""A run that took longer, on a busy machine, may have had late reads without any fault."""


@dataclass
class Sent:
    """A request on its way."""

    ask: Ask
    gateway: Gateway
    answer: Answer
    cancelled: bool = False

    @property
    def given_up(self) -> bool:
        """Nobody waits for its answer any more."""
        return self.cancelled or self.gateway.hung_up


def outcomes_of(finish: pb.Finish) -> list[str]:
    """Return how the attempts to hand the prompt over ended, in order."""
    return [trace.outcome for trace in finish.handovers]


def judge(
    schedule: Schedule,
    requests: Mapping[int, Sent],
    struck: Mapping[str, int],
    right: Sequence[list[int]],
    *,
    seconds: float,
    wrong_backups: int = 0,
) -> Iterator[str]:
    """Yield each thing that is wrong, in words; `right` has the tokens of each catalogue entry.

    The run took so many `seconds`. `wrong_backups` is how often a decode instance was offered wrong
    KV by the other one.
    """
    outcomes: Counter[str] = Counter()
    for index, sent in requests.items():
        for problem in _wrong_with(sent, right[sent.ask.entry]):
            yield f"request {index} (entry {sent.ask.entry}) {problem}"
        if sent.answer.finish is not None:
            outcomes.update(outcomes_of(sent.answer.finish))
    # Who offers may give the blocks to others if they are not read in time.
    if seconds < min(schedule.world.prefill_keeps_s, _LATE_S):
        yield from _wrong_counts(schedule, struck, outcomes, wrong_backups)


def _wrong_counts(
    schedule: Schedule, struck: Mapping[str, int], outcomes: Mapping[str, int], wrong_backups: int
) -> Iterator[str]:
    """Yield where wrong bytes were not seen as such, or others were."""
    kinds = {fault.kind for fault in schedule.faults}
    wrong_bytes = sum(struck[kind] for kind in (*WRONG_BYTES, "overwrite"))
    wrong_kv = outcomes["wrong_kv"]
    # A read may also have been given up before it was looked at; of a backup that is not counted.
    seen = wrong_kv + outcomes["deadline_exceeded"] + (schedule.world.backup != "off")
    if wrong_bytes and not seen and kinds <= set(WRONG_BYTES):
        yield f"{wrong_bytes} reads gave wrong bytes, and none was counted as wrong_kv"
    if wrong_kv and not wrong_bytes and not kinds & _MAKE_READS_LATE:
        yield f"{wrong_kv} attempts saw wrong KV where none was"
    if wrong_backups and not wrong_bytes and not kinds & {*_MAKE_READS_LATE, *ON_DECODE}:
        yield f"{wrong_backups} backups saw wrong KV where none was"


def _wrong_with(sent: Sent, right: list[int]) -> Iterator[str]:
    answer = sent.answer
    if answer.tokens != right[: len(answer.tokens)]:
        yield f"has other tokens: {answer.tokens}, not {right}"
    if sent.given_up:
        return
    finish = answer.finish
    if finish is None:
        yield "has not ended"
    elif finish.reason != "length" or len(answer.tokens) != len(right):
        said = f"{finish.reason} {finish.error.code} {finish.error.message}"
        yield f"ended as {said} after {len(answer.tokens)} tokens"
