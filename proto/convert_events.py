"""The messages of proto/events.proto and the types of core/instance_events.py, both ways."""

from collections.abc import Sequence

from baton.core.errors import HandoverError
from baton.core.hashing import DIGESTS
from baton.core.instance_events import KEY_BYTES, BlockChanges, CacheTerms, InstanceLoad
from baton.proto import events_pb2 as pb

_MOST_TOKENS = 1 << 48
_MOST_BLOCK_SIZE = 1 << 16
_MOST_PARTITIONS = 1 << 12


def events_proto(
    load: InstanceLoad, changes: Sequence[BlockChanges], terms: CacheTerms | None = None
) -> pb.InstanceEvents:
    """Return one message of the stream; the first one has the terms."""
    message = pb.InstanceEvents(
        load=pb.Load(
            queued_tokens=load.queued_tokens,
            running=load.running,
            context_tokens=load.context_tokens,
            free_tokens=load.free_tokens,
        ),
        changes=map(_changes_proto, changes),
    )
    if terms is not None:
        message.terms.CopyFrom(
            pb.CacheTerms(
                block_size=terms.block_size,
                hash_name=terms.hash_name,
                local_prefill=terms.local_prefill,
            )
        )
    return message


def terms_core(message: pb.InstanceEvents) -> CacheTerms:
    """Take the terms off the first message; HandoverError if they make no sense."""
    terms = message.terms
    if not 0 < terms.block_size <= _MOST_BLOCK_SIZE:
        raise HandoverError(f"malformed message: CacheTerms.block_size: {terms.block_size}")
    if terms.hash_name not in ("", *DIGESTS):
        raise HandoverError(f"malformed message: CacheTerms.hash_name: {terms.hash_name!r}")
    return CacheTerms(terms.block_size, terms.hash_name, terms.local_prefill)


def load_core(message: pb.InstanceEvents) -> InstanceLoad:
    """Take the load off a message; HandoverError for one that no instance has."""
    load = message.load
    if max(load.queued_tokens, load.context_tokens, load.free_tokens) > _MOST_TOKENS:
        raise HandoverError(f"malformed message: Load: {load.queued_tokens} tokens queued")
    return InstanceLoad(load.queued_tokens, load.running, load.context_tokens, load.free_tokens)


def changes_core(message: pb.BlockChanges) -> BlockChanges:
    """Take changes off the wire; HandoverError if they make no sense."""
    if len(message.stored) % KEY_BYTES or len(message.removed) % KEY_BYTES:
        sizes = f"{len(message.stored)} and {len(message.removed)} bytes of keys"
        raise HandoverError(f"malformed message: BlockChanges: {sizes}")
    if message.partition >= _MOST_PARTITIONS:
        raise HandoverError(f"malformed message: BlockChanges.partition: {message.partition}")
    return BlockChanges(
        message.partition,
        message.first,
        message.events,
        message.complete,
        message.stored,
        message.removed,
    )


def _changes_proto(changes: BlockChanges) -> pb.BlockChanges:
    return pb.BlockChanges(
        partition=changes.partition,
        first=changes.first,
        events=changes.events,
        complete=changes.complete,
        stored=changes.stored,
        removed=changes.removed,
    )
