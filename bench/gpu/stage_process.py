"""The process of one stage; `bench.gpu.campaign` starts it."""

import argparse
import importlib
import time
from pathlib import Path

from bench.gpu.records import Records
from bench.gpu.scale import SCALES
from bench.gpu.stage_run import StageRun, missing, one_line


def main() -> None:
    """Run the stage; its last record says how it ended."""
    began = time.perf_counter()
    options = _arguments()
    records = Records(options.out)
    run = StageRun(options.stage, SCALES[options.scale], records, began + options.seconds)
    try:
        importlib.import_module(options.module).run(run)
    except ModuleNotFoundError as error:
        ended = missing(error)
    except Exception as error:
        ended = one_line(error)
    else:
        ended = "complete" if run.seconds_left > 0 else "its time was spent"
    records.add(options.stage, ended=ended, took_s=round(time.perf_counter() - began, 1))


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    parser.add_argument("stage")
    parser.add_argument("module")
    parser.add_argument("--scale", choices=SCALES, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seconds", type=float, required=True)
    return parser.parse_args()


if __name__ == "__main__":
    main()
