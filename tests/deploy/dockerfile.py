"""Reads a Dockerfile as far as ours goes: stages, and their steps in order.

Whatever it does not know (heredocs, flags other than COPY's --from) is an error and never skipped.
"""

import fnmatch
import json
import re
import shlex
from dataclasses import dataclass, field

_KNOWN = {
    "ARG", "CMD", "COPY", "ENTRYPOINT", "ENV", "EXPOSE", "FROM", "HEALTHCHECK", "RUN", "SHELL",
    "USER", "WORKDIR",
}  # fmt: skip
_FROM = re.compile(r"(\S+) AS ([a-z][a-z0-9-]*)")


@dataclass(frozen=True)
class Stage:
    """One FROM and what follows it."""

    name: str
    base: str
    steps: list[tuple[str, str]] = field(default_factory=list)

    def values(self, instruction: str) -> list[str]:
        """Return what follows each of these instructions."""
        return [value for name, value in self.steps if name == instruction]

    def environment(self) -> dict[str, str]:
        """Return what its own ENV instructions set."""
        pairs = [pair for value in self.values("ENV") for pair in shlex.split(value)]
        return dict(pair.split("=", 1) for pair in pairs)

    def inherited_environment(self, stages: "dict[str, Stage]") -> dict[str, str]:
        """Return the environment of its steps: that of the stages below it, and its own."""
        below = stages[self.base].inherited_environment(stages) if self.base in stages else {}
        return {**below, **self.environment()}

    def copies_from(self) -> list[str]:
        """Return the stages of which it takes files."""
        return [stage for value in self.values("COPY") if (stage := copied(value)[0])]


def parse(text: str) -> list[Stage]:
    """Return the stages in order; raises ValueError for what it does not know."""
    stages: list[Stage] = []
    for line in _logical_lines(text):
        instruction, _, value = line.partition(" ")
        if instruction not in _KNOWN or (instruction == "RUN" and re.match(r"--|<<", value)):
            raise ValueError(f"not known: {line}")
        if instruction == "FROM":
            found = _FROM.fullmatch(value)
            if found is None:
                raise ValueError(f"no stage's name: {line}")
            stages.append(Stage(found[2], found[1]))
        elif stages:
            stages[-1].steps.append((instruction, value.strip()))
    return stages


def _logical_lines(text: str) -> list[str]:
    lines = [line for line in text.splitlines() if line.strip() and not line.startswith("#")]
    return re.sub(r"\\\n\s*", "", "\n".join(lines)).splitlines()


def copied(value: str) -> tuple[str, list[str], str]:
    """Return a COPY's stage ("" is the repo), sources and target."""
    *sources, target = value.split()
    stage = ""
    if sources[0].startswith("--"):
        flag, stage = sources.pop(0).split("=", 1)
        if flag != "--from":
            raise ValueError(f"not known: COPY {value}")
    return stage, sources, target


def listed(value: str) -> list[str]:
    """Return a command in its list form; raises ValueError for one that a shell would run."""
    found = json.loads(value)
    if not isinstance(found, list):
        raise ValueError(f"not a list: {value}")
    return found


def ignored(path: str, patterns: str) -> bool:
    """Return whether a .dockerignore's text keeps `path` out: the last line that fits decides."""
    out = False
    for line in patterns.splitlines():
        pattern = line.strip()
        if not pattern or pattern.startswith("#"):
            continue
        name = pattern.removeprefix("!")
        parts = path.split("/")
        heads = ["/".join(parts[: i + 1]) for i in range(len(parts))]
        if name.startswith("**/"):
            fits = any(fnmatch.fnmatchcase(part, name[3:]) for part in parts)
        else:
            fits = any(
                fnmatch.fnmatchcase(h, name) and h.count("/") == name.count("/") for h in heads
            )
        if fits:
            out = not pattern.startswith("!")
    return out
