"""Compile launches for sm_90 and print their fitness as JSON, or renew the snapshot of them.

python -m tests.kernels.triton.compile decode_attention   print the launches of one file
python -m tests.kernels.triton.compile --renew            write sm90.json anew
"""

import json
import sys
from pathlib import Path

from tests.kernels.triton.ahead_of_time import Fitness, fitness
from tests.kernels.triton.launches import LAUNCHES

SNAPSHOT = Path(__file__).with_name("sm90.json")


def compiled(file: str | None = None) -> dict[str, dict[str, Fitness]]:
    """Return the fitness of each launch of a kernel file, or of all."""
    return {
        name: fitness(launch)
        for name, launch in LAUNCHES.items()
        if file is None or name.partition("/")[0] == file
    }


if __name__ == "__main__":
    if sys.argv[1] == "--renew":
        lines = []
        for name, kernels in compiled().items():
            each = ",\n".join(f"  {json.dumps(k)}: {json.dumps(v)}" for k, v in kernels.items())
            lines.append(f" {json.dumps(name)}: {{\n{each}\n }}")
        SNAPSHOT.write_text("{\n" + ",\n".join(lines) + "\n}\n")
    else:
        print(json.dumps(compiled(sys.argv[1])))
