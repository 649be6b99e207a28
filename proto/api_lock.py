"""Baton's public gRPC API, locked: `python -m baton.proto.api_lock` locks what was added to it.

The lock (proto/inference.lock) says in one line each what a client may rely on. A line that is
gone or different is a break: a method, message or field removed, renamed, renumbered or given
another type, or one that moved into or out of a `oneof`. More lines are no break, so messages can
grow; what was once locked stays.
"""

from collections.abc import Iterable, Iterator
from pathlib import Path

from google.protobuf import descriptor as d

from baton.proto import inference_pb2 as pb

LOCK = Path(__file__).resolve().with_name("inference.lock")

_TYPES = {
    number: name.removeprefix("TYPE_").lower()
    for name, number in vars(d.FieldDescriptor).items()
    if name.startswith("TYPE_")
}


def facts(file: d.FileDescriptor) -> list[str]:
    """Return what a client of a .proto file may rely on, a sorted line each."""
    return sorted(
        [
            *_services(file.services_by_name.values()),
            *_enums(file.enum_types_by_name.values()),
            *_messages(file.message_types_by_name.values()),
        ]
    )


def breaks(locked: Iterable[str], now: Iterable[str]) -> list[str]:
    """Return the locked lines that do not hold any more."""
    return sorted(set(locked) - set(now))


def _services(services: Iterable[d.ServiceDescriptor]) -> Iterator[str]:
    for service in services:
        for method in service.methods:
            sends = "stream " if method.client_streaming else ""
            tells = "stream " if method.server_streaming else ""
            yield (
                f"rpc {method.full_name}({sends}{method.input_type.full_name}) returns"
                f" ({tells}{method.output_type.full_name})"
            )


def _messages(messages: Iterable[d.Descriptor]) -> Iterator[str]:
    for message in messages:
        yield f"message {message.full_name}"
        for field in message.fields:
            yield _field(message, field)
        yield from _enums(message.enum_types)
        yield from _messages(message.nested_types)


def _field(message: d.Descriptor, field: d.FieldDescriptor) -> str:
    named = field.message_type or field.enum_type
    kind = _TYPES[field.type] if named is None else named.full_name
    label = "repeated " if field.is_repeated else ""
    oneof = field.containing_oneof
    within = "" if oneof is None else f" in {oneof.name}"  # `optional` is a oneof named _field
    return f"field {message.full_name} {field.number} {label}{kind} {field.name}{within}"


def _enums(enums: Iterable[d.EnumDescriptor]) -> Iterator[str]:
    for enum in enums:
        for value in enum.values:
            yield f"enum {enum.full_name} {value.number} {value.name}"


def read_lock() -> list[str]:
    """Return the locked lines."""
    return LOCK.read_text().splitlines()


def main() -> None:
    """Lock what was added; refuse if something locked is gone."""
    now = facts(pb.DESCRIPTOR)
    if LOCK.exists() and (broken := breaks(read_lock(), now)):
        raise SystemExit("clients rely on this:\n" + "\n".join(broken))
    LOCK.write_text("\n".join(now) + "\n")


if __name__ == "__main__":
    main()
