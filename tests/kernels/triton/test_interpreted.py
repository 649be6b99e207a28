"""What the Triton kernels compute, by Triton's interpreter against references in float64."""

import pytest

from tests.kernels.triton.conftest import LIMIT_S, Runs

pytest.importorskip("triton", reason="Triton has wheels for Linux only")


@pytest.mark.timeout(LIMIT_S + 100)
def test_kernels_compute_what_the_reference_does(runs: Runs):
    """Every test of interpreted/ passes, in a process of its own; see conftest.py there."""
    status, out, err = runs.result("interpret")
    assert status == 0, out + err
    assert "skipped" not in out
