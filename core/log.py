"""Structured log set-up: one line per event, key=value on a terminal and JSON elsewhere."""

import contextlib
import logging
import sys

import structlog

Logger = structlog.stdlib.BoundLogger


def configure(*, level: int = logging.INFO) -> None:
    """Send log lines of `level` and above to stderr; call once per process, at its start."""
    pretty = sys.stderr.isatty()
    structlog.configure(
        processors=[
            structlog.contextvars.merge_contextvars,
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            structlog.processors.format_exc_info,
            structlog.dev.ConsoleRenderer()
            if pretty
            else structlog.processors.JSONRenderer(sort_keys=True),
        ],
        wrapper_class=structlog.make_filtering_bound_logger(level),
        logger_factory=structlog.PrintLoggerFactory(sys.stderr),
        cache_logger_on_first_use=False,
    )


def bound(**values: str) -> contextlib.AbstractContextManager[None]:
    """Let all lines that this task logs inside carry `values`."""
    return structlog.contextvars.bound_contextvars(**values)


def get_logger(component: str) -> Logger:
    """Return a logger whose lines carry `component`."""
    logger: Logger = structlog.get_logger(component=component)
    return logger
