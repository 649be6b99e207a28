"""Write what follows from values.yaml and from Baton's configs: the chart's schema and its README.

python deploy/helm/generate/generate.py            # write
python deploy/helm/generate/generate.py --check    # say what is not fresh
"""

import json
import sys
from pathlib import Path

from values_doc import documented
from values_schema import values_schema

CHART = Path(__file__).parent.parent / "baton"


def rendered() -> dict[Path, str]:
    """Return what each generated file should hold."""
    head = (Path(__file__).parent / "README.head.md").read_text()
    rows = [f"| `{'.'.join(v.path)}` | {v.text} | {v.shown} |" for v in documented()]
    table = "\n".join(["| value | what it is | default |", "|---|---|---|", *rows])
    return {
        CHART / "values.schema.json": json.dumps(values_schema(), indent=1, sort_keys=True) + "\n",
        CHART / "README.md": f"{head}\n## Values\n\n{table}\n",
    }


def stale() -> list[str]:
    """Return the names of files that are not as they should be."""
    return [
        path.name
        for path, text in rendered().items()
        if not path.exists() or path.read_text() != text
    ]


if __name__ == "__main__":
    if "--check" in sys.argv:
        sys.exit(", ".join(stale()) + ": not fresh" if stale() else 0)
    for path, text in rendered().items():
        path.write_text(text)
