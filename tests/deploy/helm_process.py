"""Helm's own library, in a process of its own: it brings a Go runtime with threads and signals.

Reads requests from stdin and answers on stdout, a line of JSON each.
"""

import functools
import json
import sys
from typing import Any

import helm_python as helm

_load = functools.cache(helm.Chart.load)


def answer(what: str, chart: str, values: dict[str, Any], options: dict[str, Any]) -> Any:
    """Render the chart with these values, or lint it."""
    if what == "render":
        return _load(chart).render(values, **options)
    return helm.lint(chart, values, **options)


for line in sys.stdin:
    try:
        told = {"answer": answer(**json.loads(line))}
    except helm.HelmError as error:
        told = {"refused": str(error)}
    sys.stdout.write(f"{json.dumps(told)}\n")
    sys.stdout.flush()
