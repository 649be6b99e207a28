"""The page about errors, made from core/errors.py and the tables of both APIs."""

import baton.core.errors as errors
from baton.proto.errors import STATUS

_HEAD = """# Errors

Each error has one stable code, the same in HTTP, in gRPC, in metrics (`outcome`) and in logs. HTTP
has it in the body, in OpenAI's shape: `{"error": {"message", "type", "param", "code"}}`. gRPC's
status message opens with it: `overloaded: 256 requests are open`. After `overloaded` HTTP says when
to come back in `Retry-After` (and `X-Refusal-Reason` says why), gRPC in `grpc-retry-pushback-ms`.

| code | in Python | HTTP | gRPC | may work if sent again |
|---|---|---|---|---|
"""


def error_reference() -> str:
    """Return the page, in Markdown."""
    rows = [
        f"| `{kind.code}` | `{kind.__name__}` | {kind.http_status} | {STATUS[kind.code].name} |"
        f" {'yes' if kind.retryable else 'no'} |"
        for kind in errors.all_errors().values()
    ]
    tree = str(errors.__doc__).split("\n\n")[1]
    return _HEAD + "\n".join(rows) + f"\n\n## As a tree\n\n```text\n{tree}\n```\n"
