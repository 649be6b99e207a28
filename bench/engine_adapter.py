"""Talks to one adapter: starts it under its engine's interpreter, asks, and ends it."""

import contextlib
import json
import os
import select
import subprocess
from pathlib import Path
from typing import Any

PEERS = Path(__file__).resolve().parent / "peers"
ROOT = PEERS.parents[1]
SCRIPTS = {
    "baton": "baton_engine.py",
    "hf-generate": "hf.py",
    "hf-continuous": "hf.py",
    "openvino": "openvino_cb.py",
    "llama.cpp": "llamacpp.py",
    "ctranslate2": "ct2.py",
    "vllm": "vllm_cpu.py",
}


class AdapterError(Exception):
    """The adapter said so, ended, or took too long."""


class Adapter:
    """One adapter's process; ended by `close`."""

    def __init__(self, engine: str, python: str, threads: int, log: Path) -> None:
        environment = os.environ | {"OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1"}
        # Baton's folders have names that the peers' packages have too: they must not see them.
        environment["PYTHONPATH"] = str(ROOT) if engine == "baton" else ""
        self._log = log
        with log.open("ab") as errors:
            self._process = subprocess.Popen(
                [python, str(PEERS / SCRIPTS[engine])],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                env=environment,
                start_new_session=True,
            )

    def ask(self, timeout_s: float, **fields: Any) -> dict[str, Any]:
        """Send one line and return the answer; raises AdapterError."""
        stdin, stdout = self._process.stdin, self._process.stdout
        assert stdin is not None
        assert stdout is not None
        try:
            stdin.write(json.dumps(fields).encode() + b"\n")
            stdin.flush()
        except BrokenPipeError:
            raise AdapterError(f"it ended; see {self._log}") from None
        if not select.select([stdout], [], [], timeout_s)[0]:
            raise AdapterError(f"no answer within {timeout_s:g} s")
        line = stdout.readline()
        if not line:
            raise AdapterError(f"it ended; see {self._log}")
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise AdapterError(answer["error"])
        return answer

    def close(self) -> None:
        """End the process; it has nothing to save."""
        self._process.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            assert pipe is not None
            with contextlib.suppress(BrokenPipeError):
                pipe.close()
