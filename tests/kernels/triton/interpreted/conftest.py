"""Tests in this folder run in processes of their own, where kernels are interpreted on the CPU.

test_interpreted.py starts these processes: Triton decides when it is imported.
"""

import os

collect_ignore_glob = [] if os.environ.get("TRITON_INTERPRET") == "1" else ["*.py"]

if os.environ.get("TRITON_INTERPRET") == "1":
    import torch

    from tests.kernels.triton.low_precision import repair

    repair()
    torch.set_num_threads(1)
