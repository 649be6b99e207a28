"""Compile all launches for sm_90; print their fitness as JSON, or how it differs from the snapshot.

python -m tests.kernels.triton.compile
python -m tests.kernels.triton.compile --differences
python -m tests.kernels.triton.compile --renew
"""

import json
import sys
from pathlib import Path

from tests.kernels.triton.ahead_of_time import fitness
from tests.kernels.triton.differences import differences
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
    elif "--differences" in sys.argv:
        before = json.loads(SNAPSHOT.read_text())
        for name, launch in LAUNCHES.items():
            for line in differences(before.get(name, {}), fitness(launch)):
                print(f"{name}, {line}", flush=True)
    else:
        print(compiled())
