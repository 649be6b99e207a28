"""Generate the stubs beside the .proto files: `python -m baton.proto.generate [--out DIR]`."""

import argparse
from pathlib import Path

from grpc_tools import protoc

ROOT = Path(__file__).resolve().parent.parent
PROTOS = ("events", "inference", "lease", "worker")


def generate(out: Path) -> None:
    """Write <name>_pb2.py, <name>_pb2.pyi and <name>_pb2_grpc.py under `out`/baton/proto."""
    for name in PROTOS:
        arguments = [
            "protoc",
            f"-I{ROOT}",
            f"--python_out={out}",
            f"--pyi_out={out}",
            f"--grpc_python_out={out}",
            f"{ROOT}/baton/proto/{name}.proto",
        ]
        if protoc.main(arguments) != 0:
            raise SystemExit(f"protoc failed on {name}.proto")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=ROOT)
    generate(parser.parse_args().out)


if __name__ == "__main__":
    main()
