"""The messages of proto/lease.proto and the types of core/lease.py, both ways."""

from baton.core.errors import HandoverError
from baton.core.lease import Beat, Leave, Report, Standing
from baton.core.metric_table import REPORTED
from baton.proto import lease_pb2 as pb

_LEAVES = {
    Leave.GOODBYE: pb.GOODBYE,
    Leave.WITHDRAW: pb.WITHDRAW,
    Leave.REVOKE: pb.REVOKE,
}
_LONGEST_LEASE_S = 3600.0


def beat_proto(beat: Beat, incarnation: int, leave: Leave | None = None) -> pb.Beat:
    """Return a beat for the instance of `incarnation`; with `leave`, the granter's last."""
    return pb.Beat(
        granter=beat.granter,
        epoch=beat.epoch,
        lease_s=beat.lease_s,
        controls=beat.controls,
        incarnation=incarnation,
        leave=pb.STAY if leave is None else _LEAVES[leave],
    )


def beat_core(message: pb.Beat) -> tuple[Beat, Leave | None]:
    """Take a beat off the wire; raises HandoverError for one that makes no sense."""
    if not message.granter or not 0 <= message.lease_s <= _LONGEST_LEASE_S:  # false for NaN too
        raise HandoverError(f"malformed message: Beat: {message.granter!r}, {message.lease_s} s")
    leaves = {number: leave for leave, number in _LEAVES.items()}
    beat = Beat(message.granter, message.epoch, message.lease_s, message.controls)
    return beat, leaves.get(message.leave)


def report_proto(report: Report) -> pb.Report:
    """Return a report as it travels."""
    return pb.Report(
        standing=report.standing,
        epoch=report.epoch,
        draining=report.draining,
        problems=report.problems,
        steps=report.steps,
        waiting=report.waiting,
        running=report.running,
        open_requests=report.open_requests,
        blocks_used=report.blocks_used,
        blocks_total=report.blocks_total,
        waited_s=report.waited_s,
        stats=report.stats,
    )


def report_core(message: pb.Report) -> Report:
    """Take a report off the wire; raises HandoverError for an unknown standing."""
    try:
        standing = Standing(message.standing)
    except ValueError:
        raise HandoverError(f"malformed message: Report.standing: {message.standing!r}") from None
    return Report(
        standing,
        epoch=message.epoch,
        draining=message.draining,
        problems=tuple(message.problems),
        steps=message.steps,
        waiting=message.waiting,
        running=message.running,
        open_requests=message.open_requests,
        blocks_used=message.blocks_used,
        blocks_total=message.blocks_total,
        waited_s=message.waited_s,
        stats={name: message.stats[name] for name in REPORTED if name in message.stats},
    )
