"""Compile all launches for sm_90; print their fitness as JSON, or renew the snapshot of it.

python -m tests.kernels.triton.compile
python -m tests.kernels.triton.compile --renew
"""

import json
import sys
from pathlib import Path

from tests.kernels.triton.ahead_of_time import fitness
from tests.kernels.triton.launches import LAUNCHES

SNAPSHOT = Path(__file__).with_name("sm90.json")


def compiled() -> str:
    """Return the fitness of every launch, a kernel a line."""
    launches = []
    for name, launch in LAUNCHES.items():
        kernels = (f"  {json.dumps(k)}: {json.dumps(v)}" for k, v in fitness(launch).items())
        launches.append(f" {json.dumps(name)}: {{\n" + ",\n".join(kernels) + "\n }")
    return "{\n" + ",\n".join(launches) + "\n}\n"


if __name__ == "__main__":
    if "--renew" in sys.argv:
        SNAPSHOT.write_text(compiled())
    else:
        print(compiled())
