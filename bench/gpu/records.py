"""The file of results: one JSON object a line, appended as soon as it is known, and read again.

    {"stage": "decode", "case": "batch 32 at 1024", "took_s": 4.1, "figures": {...}}
    {"stage": "decode", "case": "batch 256 at 4096", "took_s": 0.2, "error": "OutOfMemoryError..."}
    {"stage": "handover", "skipped": "no module msgpack"}
    {"stage": "decode", "ended": "complete", "took_s": 31.5}

Of several lines for one case the last counts; so a run that is begun again adds what the first
one had no time for, and tries again what failed.
"""

import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

Record = Mapping[str, Any]
Figures = Mapping[str, Any]


class Records:
    """The results in a file that may not be there yet."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def __repr__(self) -> str:
        return f"<Records {self._path}>"

    def add(self, stage: str, **fields: Any) -> None:
        """Append one line; it is in the file when this returns."""
        line = json.dumps({"stage": stage} | fields, default=str)
        with self._path.open("ab+") as file:
            if file.tell():
                file.seek(-1, os.SEEK_END)
                if file.read() != b"\n":  # its last writer did not finish
                    line = "\n" + line
            file.write(line.encode() + b"\n")

    def read(self) -> list[Record]:
        """Return all whole lines; one that was cut short by the end of its writer is left out."""
        if not self._path.exists():
            return []
        found: list[Record] = []
        for line in self._path.read_text(encoding="utf-8").splitlines():
            try:
                found.append(json.loads(line))
            except ValueError:
                continue
        return found


def cases(records: Iterable[Record], stage: str) -> dict[str, Record]:
    """Return a stage's last record of each case, those that failed too."""
    return {r["case"]: r for r in records if r["stage"] == stage and "case" in r}


def figures(records: Iterable[Record], stage: str) -> dict[str, Figures]:
    """Return a stage's figures by case, without what failed."""
    found = cases(records, stage)
    return {case: record["figures"] for case, record in found.items() if "figures" in record}


def is_complete(records: Iterable[Record], stage: str) -> bool:
    """Return whether a stage has come to its end with every case measured."""
    records = list(records)
    ends = [r.get("ended") for r in records if r["stage"] == stage and "case" not in r]
    failed = any("error" in record for record in cases(records, stage).values())
    return bool(ends) and ends[-1] == "complete" and not failed
