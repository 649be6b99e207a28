"""Structured log set-up: one line per event, key=value on a terminal and JSON elsewhere.

A line about a request has its id as `request`: a task that serves one is tagged with it, and so
are the tasks that it starts.
"""

import contextlib
import logging
import os
import sys
from typing import Any

import structlog

from baton.core.errors import InvalidConfig

Logger = structlog.stdlib.BoundLogger

FORMATS = ("auto", "json", "text")
"""`auto` is text on a terminal, and JSON elsewhere."""
LEVELS = {
    "debug": logging.DEBUG,
    "info": logging.INFO,
    "warning": logging.WARNING,
    "error": logging.ERROR,
}
_FORMAT = "BATON_LOG_FORMAT"
_LEVEL = "BATON_LOG_LEVEL"
"""Environment, by which the processes of a cluster agree."""


def choose(*, form: str, level: str) -> None:
    """Let this process, and those that it starts, log so; call it before `configure`.

    Raises InvalidConfig for what is neither one of FORMATS, nor of LEVELS.
    """
    _check("log_format", form, FORMATS)
    _check("log_level", level, tuple(LEVELS))
    os.environ[_FORMAT], os.environ[_LEVEL] = form, level


def configure(*, level: int | None = None) -> None:
    """Send log lines of `level` and above to stderr; call once per process, at its start.

    How, and by default from which level on, the environment says: see `choose`. Raises
    InvalidConfig if it says something else.
    """
    form, name = os.environ.get(_FORMAT, "auto"), os.environ.get(_LEVEL, "info")
    _check(_FORMAT, form, FORMATS)
    _check(_LEVEL, name, tuple(LEVELS))
    pretty = form == "text" or (form == "auto" and sys.stderr.isatty())
    structlog.configure(
        processors=[
            structlog.contextvars.merge_contextvars,
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            structlog.processors.format_exc_info,
            structlog.dev.ConsoleRenderer(colors=sys.stderr.isatty())
            if pretty
            else structlog.processors.JSONRenderer(sort_keys=True),
        ],
        wrapper_class=structlog.make_filtering_bound_logger(
            LEVELS[name] if level is None else level
        ),
        # Asked for at each line: whoever exchanges stderr, as tests do, closes what it was.
        logger_factory=lambda *_: structlog.PrintLogger(sys.stderr),
        cache_logger_on_first_use=False,
    )


def _check(field: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise InvalidConfig(field, value, ", ".join(allowed))


def bound(**values: str) -> contextlib.AbstractContextManager[None]:
    """Let all lines that this task logs inside carry `values`."""
    return structlog.contextvars.bound_contextvars(**values)


def tag(**values: Any) -> None:
    """Let all lines that this task logs from now on carry `values`, and tasks that it starts."""
    structlog.contextvars.bind_contextvars(**values)


def tag_request(request_id: str, traceparent: str) -> None:
    """Let them carry a request's id, and its trace's if it belongs to one, as tracing shows it."""
    parts = traceparent.split("-")
    tag(request=request_id, **({"trace": parts[1][:32]} if len(parts) > 1 else {}))


def get_logger(component: str) -> Logger:
    """Return a logger whose lines carry `component`."""
    logger: Logger = structlog.get_logger(component=component)
    return logger
