"""The public gRPC API keeps what it promised, and says what everything is."""

import re
from itertools import pairwise
from pathlib import Path

import pytest
from google.protobuf import descriptor_pb2, descriptor_pool

from baton.proto import api_lock
from baton.proto import inference_pb2 as pb

PROTO = Path(api_lock.__file__).with_name("inference.proto")


def test_nothing_that_clients_rely_on_is_gone():
    assert api_lock.breaks(api_lock.read_lock(), api_lock.facts(pb.DESCRIPTOR)) == []


def test_all_there_is_is_locked():
    found = api_lock.facts(pb.DESCRIPTOR)
    assert found == api_lock.read_lock(), "run `python -m baton.proto.api_lock`"


def build(change) -> list[str]:
    """Return the facts of the API as `change` leaves it."""
    file = descriptor_pb2.FileDescriptorProto()
    pb.DESCRIPTOR.CopyToProto(file)
    change(file)
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    return api_lock.facts(pool.FindFileByName(file.name))


def message(file: descriptor_pb2.FileDescriptorProto, name: str) -> descriptor_pb2.DescriptorProto:
    return next(message for message in file.message_type if message.name == name)


def usage(file: descriptor_pb2.FileDescriptorProto) -> descriptor_pb2.DescriptorProto:
    return message(file, "Usage")


def rename(file):
    usage(file).field[0].name = "input_tokens"


def renumber(file):
    usage(file).field[0].number = 9


def retype(file):
    usage(file).field[0].type = descriptor_pb2.FieldDescriptorProto.TYPE_UINT64


def repeat(file):
    usage(file).field[0].label = descriptor_pb2.FieldDescriptorProto.LABEL_REPEATED


def remove(file):
    del usage(file).field[0]


def another_message(file):
    message(file, "GenerateResponse").field[4].type_name = ".baton.v1.TokenIds"


def into_a_oneof(file):
    error = message(file, "Error")
    error.oneof_decl.insert(0, descriptor_pb2.OneofDescriptorProto(name="why"))
    for field in error.field:
        field.oneof_index = 1 if field.proto3_optional else 0


def remove_a_method(file):
    del file.service[0].method[0]


def stream_no_more(file):
    file.service[0].method[0].server_streaming = False


BREAKS = [
    (rename, 1),
    (renumber, 1),
    (retype, 1),
    (repeat, 1),
    (remove, 1),
    (another_message, 1),
    (into_a_oneof, 2),
    (remove_a_method, 1),
    (stream_no_more, 1),
]


@pytest.mark.parametrize(("change", "count"), BREAKS)
def test_a_break_is_found(change, count: int):
    assert len(api_lock.breaks(api_lock.read_lock(), build(change))) == count


def test_growth_is_no_break():
    def grow(file: descriptor_pb2.FileDescriptorProto) -> None:
        usage(file).field.add(
            name="more",
            number=99,
            type=descriptor_pb2.FieldDescriptorProto.TYPE_UINT32,
            label=descriptor_pb2.FieldDescriptorProto.LABEL_OPTIONAL,
        )
        file.message_type.add(name="New")

    now = build(grow)
    assert api_lock.breaks(api_lock.read_lock(), now) == []
    assert len(now) == len(api_lock.read_lock()) + 2


def test_every_method_message_and_field_is_documented():
    lines = PROTO.read_text().splitlines()
    said = re.compile(r"\s*(rpc|message|service|(repeated |optional |map<.*> )?[\w.]+ \w+ = \d+)")
    bare = [
        line
        for before, line in pairwise(lines)
        if said.match(line) and not before.strip().startswith("//")
    ]
    assert bare == []
