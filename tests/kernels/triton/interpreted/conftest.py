"""Tests in this folder run in a process of their own, where kernels are interpreted on the CPU.

Whether a kernel is interpreted is decided when it is defined. test_interpreted.py runs them all;
by hand:

    TRITON_INTERPRET=1 pytest tests/kernels/triton/interpreted
"""

import os

collect_ignore_glob = [] if os.environ.get("TRITON_INTERPRET") == "1" else ["*.py"]

if os.environ.get("TRITON_INTERPRET") == "1":
    import torch

    from tests.kernels.triton.low_precision import repair

    repair()
    torch.set_num_threads(1)
