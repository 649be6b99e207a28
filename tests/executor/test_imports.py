"""What an instance imports before it serves: every process of a cluster waits for it."""

import subprocess
import sys


def test_an_instance_does_not_load_compilers() -> None:
    """torch's own takes seconds and leaves a folder in TMPDIR; Triton's is for GPUs."""
    seen = subprocess.run(
        [
            sys.executable,
            "-c",
            "import sys, baton.prefill_worker.worker, baton.decode_worker.worker;"
            "print(sorted({'torch._dynamo', 'torch._inductor', 'triton'} & set(sys.modules)))",
        ],
        capture_output=True,
        text=True,
        check=True,
    )
    assert seen.stdout.strip() == "[]"
