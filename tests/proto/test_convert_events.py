import pytest

from baton.core.errors import HandoverError
from baton.core.instance_events import BlockChanges, CacheTerms, InstanceLoad
from baton.proto import events_pb2 as pb
from baton.proto.convert_events import changes_core, events_proto, load_core, terms_core

TERMS = CacheTerms(16, "sha256", local_prefill=True)
LOAD = InstanceLoad(100, 7, 3000, 50_000)
CHANGES = BlockChanges(3, 1 << 40, 17, True, bytes(range(16)), bytes(8))


def test_what_is_told_arrives_as_it_was():
    first = pb.InstanceEvents.FromString(events_proto(LOAD, [CHANGES], TERMS).SerializeToString())
    assert terms_core(first) == TERMS
    assert load_core(first) == LOAD
    assert [changes_core(message) for message in first.changes] == [CHANGES]
    assert not events_proto(LOAD, []).HasField("terms")


@pytest.mark.parametrize(
    "message",
    [
        pb.InstanceEvents(),
        pb.InstanceEvents(terms=pb.CacheTerms(block_size=16, hash_name="md5")),
        pb.InstanceEvents(terms=pb.CacheTerms(block_size=1 << 20, hash_name="sha256")),
    ],
)
def test_terms_that_make_no_sense_are_refused(message):
    with pytest.raises(HandoverError, match="CacheTerms"):
        terms_core(message)


def test_changes_and_loads_that_make_no_sense_are_refused():
    for changes in (
        pb.BlockChanges(stored=bytes(7)),
        pb.BlockChanges(removed=bytes(9)),
        pb.BlockChanges(partition=1 << 20),
    ):
        with pytest.raises(HandoverError, match="BlockChanges"):
            changes_core(changes)
    with pytest.raises(HandoverError, match="Load"):
        load_core(pb.InstanceEvents(load=pb.Load(queued_tokens=1 << 60)))
