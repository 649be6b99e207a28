"""The page about the public gRPC API, made from proto/inference.proto and its comments."""

import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

from google.protobuf.descriptor_pb2 import (
    DescriptorProto,
    FieldDescriptorProto,
    FileDescriptorProto,
    FileDescriptorSet,
    MethodDescriptorProto,
)
from grpc_tools import protoc

_ROOT = Path(__file__).resolve().parents[2]
_FILE = "baton/proto/inference.proto"
_SYNTAX, _MESSAGES, _SERVICES, _FIELDS, _METHODS = 12, 4, 6, 2, 2
"""Numbers by which descriptor.proto's SourceCodeInfo.Location.path names things."""

Comments = dict[tuple[int, ...], str]


def grpc_reference() -> str:
    """Return the page, in Markdown; raises RuntimeError if protoc cannot read the file."""
    file = _described()
    comments = {tuple(at.path): _text(at) for at in file.source_code_info.location}
    head = "\n".join(
        line.strip()
        for at in file.source_code_info.location
        if tuple(at.path) == (_SYNTAX,)
        for block in [*at.leading_detached_comments, at.leading_comments]
        for line in block.splitlines()
    )
    parts = ["# gRPC API", "", head.strip(), "", f"Made from `{_FILE.removeprefix('baton/')}`."]
    for number, service in enumerate(file.service):
        parts += ["", f"## Service `{file.package}.{service.name}`", ""]
        for i, method in enumerate(service.method):
            told = comments.get((_SERVICES, number, _METHODS, i), "")
            parts += [f"### `{method.name}`", "", f"{_signature(method)}", "", told, ""]
    parts += ["", "## Messages", ""]
    for number, message in enumerate(file.message_type):
        parts += _message(message, (_MESSAGES, number), comments)
    return "\n".join(parts) + "\n"


def _described() -> FileDescriptorProto:
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "inference.bin"
        arguments = ["protoc", f"-I{_ROOT}", "--include_source_info"]
        if protoc.main([*arguments, f"--descriptor_set_out={out}", f"{_ROOT}/{_FILE}"]) != 0:
            raise RuntimeError(f"protoc cannot read {_FILE}")
        return FileDescriptorSet.FromString(out.read_bytes()).file[0]


def _text(at: object) -> str:
    """Return the comment before a thing, as one line."""
    return " ".join(str(getattr(at, "leading_comments", "")).split())


def _signature(method: MethodDescriptorProto) -> str:
    sent = "stream of " * method.client_streaming + _link(method.input_type)
    got = "stream of " * method.server_streaming + _link(method.output_type)
    return f"{sent} → {got}"


def _message(message: DescriptorProto, path: tuple[int, ...], comments: Comments) -> Iterator[str]:
    yield from (f"### `{message.name}`", "", comments.get(path, ""), "")
    if not message.field:
        return
    yield from ("| field | number | type | |", "|---|---|---|---|")
    for i, field in enumerate(message.field):
        told = comments.get((*path, _FIELDS, i), "").replace("|", "\\|")
        yield f"| `{field.name}` | {field.number} | {_type(field, message)} | {told} |"
    yield ""


def _type(field: FieldDescriptorProto, message: DescriptorProto) -> str:
    entry = _map_entry(field, message.nested_type)
    if entry is not None:
        key, value = (_type(part, message) for part in entry.field)
        return f"map of {key} to {value}"
    name = FieldDescriptorProto.Type.Name(field.type).removeprefix("TYPE_").lower()
    text = _link(field.type_name) if field.type_name else name
    if field.label == FieldDescriptorProto.LABEL_REPEATED:
        return f"repeated {text}"
    if field.proto3_optional:
        return f"optional {text}"
    if field.HasField("oneof_index"):
        return f"{text}; one of `{message.oneof_decl[field.oneof_index].name}`"
    return text


def _map_entry(
    field: FieldDescriptorProto, nested: Sequence[DescriptorProto]
) -> DescriptorProto | None:
    """Return the entry type that protoc makes of a map, if `field` is one."""
    own = field.type_name.rpartition(".")[2]
    return next((t for t in nested if t.options.map_entry and t.name == own), None)


def _link(full_name: str) -> str:
    name = full_name.rpartition(".")[2]
    return f"[{name}](#{name.lower()})"
