"""Tests in this folder run where kernels are interpreted: see tests/kernels/triton/interpreted."""

import os

collect_ignore_glob = [] if os.environ.get("TRITON_INTERPRET") == "1" else ["*.py"]
