"""What the machine must have: the stages load where most of what Baton depends on is missing."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[3]

PROGRAM = """
import importlib, sys

MISSING = {"pydantic", "structlog", "msgpack", "ray", "grpc", "google", "prometheus_client",
    "fastapi", "uvicorn", "typer", "rich", "httpx", "libucx", "tokenizers", "transformers",
    "jinja2"}

class Missing:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in MISSING:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Missing())
from bench.gpu.campaign import STAGES
for name in [stage.module for stage in STAGES] + ["bench.gpu.prefill_process"]:
    importlib.import_module(name)
importlib.import_module("baton.kv_transfer.cuda_ipc.libcuda")
importlib.import_module("baton.kernels.run_copy")
importlib.import_module("baton.executor.cuda_queue")
print("all loaded")
"""


def test_stages_load_without_what_serving_needs():
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", PROGRAM]
    run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert run.stdout.strip() == "all loaded", run.stderr
