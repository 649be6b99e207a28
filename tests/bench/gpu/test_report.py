"""The tables of a run, from lines as a run on a GPU would leave them; the numbers are made up."""

from typing import Any

import pytest

from bench.gpu.floors import Ceilings
from bench.gpu.report import ceilings_of, report
from bench.gpu.targets import DECODE, overhead_verdict, verdict

MACHINE = {
    "stage": "machine",
    "scale": "full",
    "device": "NVIDIA H200",
    "torch": "2.11.0",
    "cuda": "13.0",
    "python": "3.12.3",
    "commit": "abc1234",
}


def case(stage: str, name: str, **figures: Any) -> dict[str, Any]:
    return {"stage": stage, "case": name, "figures": figures}


CEILINGS = [
    case("ceilings", "copy", bytes_s=4.2e12),
    case("ceilings", "read", bytes_s=4.0e12),
    case("ceilings", "product 4096x4096x14336", flops_s=6.0e14),
    case("ceilings", "product 8192x8192x8192", flops_s=8.0e14),
    case("ceilings", "graph node", node_s=1.5e-6),
]


def row(text: str, begin: str) -> list[str]:
    """Return the cells of the one row that begins so."""
    (line,) = [line for line in text.splitlines() if line.startswith(f"| {begin} |")]
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_without_a_run_there_is_nothing_to_say():
    assert report([]) == "nothing was measured yet"


def test_the_best_product_and_the_read_are_the_ceilings():
    assert ceilings_of(CEILINGS) == Ceilings(4.0e12, 8.0e14)
    assert ceilings_of(CEILINGS[:1]) is None
    assert row(report([MACHINE, *CEILINGS]), "read")[1] == "4,000 GB/s"


def test_a_step_is_a_fraction_of_its_floor():
    # 15,009,316,864 bytes of weights and 32 x 1024 tokens of 131,072 bytes, at 4 TB/s: 4.826 ms.
    step = case("decode", "x", batch=32, context=1024, step_s=7.5e-3, overhead=0.02)
    found = row(report([MACHINE, *CEILINGS, step]), "32")
    assert found[2:8] == ["4.83", "7.50", "0.64", "0.48 / 0.62 / 0.70", "parity", "2.0% (parity)"]
    assert found[8] == "4,267"


def test_a_prompt_is_a_fraction_of_the_product():
    prompt = case("prefill", "1024 tokens", tokens=1024, prompt_s=30e-3)
    found = row(report([MACHINE, *CEILINGS, prompt]), "1024")
    # 14.57 TFLOP at 800 TFLOP/s.
    assert found[1:6] == ["18.21", "30.00", "0.61", "0.50 / 0.62 / 0.68", "first"]


def test_a_prompt_by_pieces_has_a_row_of_its_own():
    prompt = case("prefill", "x", tokens=1024, pieces=True, prompt_s=30e-3)
    found = row(report([MACHINE, *CEILINGS, prompt]), "1024 by pieces")
    assert found[2] == "30.00"


def test_a_kernel_is_a_fraction_of_bytes_or_operations():
    name = "decode_attention bf16 batch 128 at 4096"
    timing = {"median_s": 1e-3, "low_s": 0.9e-3, "high_s": 1.1e-3}
    kernel = case("kernels", name, bytes=3_400_000_000, flops=10, **timing)
    other = case("kernels", "torch linear", bytes=10, flops=400_000_000_000, **timing)
    text = report([MACHINE, *CEILINGS, kernel, other])
    assert row(text, name)[1:] == ["850.0", "1,000.0", "20%", "0.85", "0.80 / 0.90", "first"]
    assert row(text, "torch linear")[4] == "0.50"


def test_the_other_stages_have_their_tables():
    lines = [
        case("correctness", "4 x 64", layers=32, error=2e-2, peer_error=2.5e-2, same_best=0.97),
        case("handover", "whole blocks", bytes=4e9, bytes_s=1.5e12, identical=True),
        case("decode", "x", batch=32, context=1024, step_s=8e-3),
        case("transformers", "static cache", batch=32, context=1024, tokens_s=1000.0),
    ]
    text = report([MACHINE, *CEILINGS, *lines])
    assert row(text, "4 x 64")[2:] == ["2.00e-02", "2.50e-02", "0.80", "97.0%"]
    assert row(text, "whole blocks")[1:] == ["4.00", "1500.0", "yes"]
    assert row(text, "static cache")[1:] == ["1,000", "4,000", "4.00"]


def test_what_was_not_measured_is_said():
    lines = [
        {"stage": "decode", "case": "batch 256", "error": "OutOfMemoryError: 9 GB"},
        {"stage": "decode", "ended": "its time was spent"},
        {"stage": "handover", "ended": "skipped: no module msgpack"},
        {"stage": "prefill", "ended": "complete"},
    ]
    text = report([MACHINE, *lines])
    assert "- decode, batch 256: OutOfMemoryError: 9 GB" in text
    assert "- decode: its time was spent" in text
    assert "- handover: skipped: no module msgpack" in text
    assert "prefill" not in text


@pytest.mark.parametrize(
    ("fraction", "reached"),
    [(0.47, "none"), (0.48, "first"), (0.62, "parity"), (0.7, "stretch"), (0.9, "stretch")],
)
def test_the_target_that_is_reached(fraction, reached):
    assert verdict(fraction, DECODE[32, 1024]) == reached


def test_of_overhead_less_is_better():
    assert [overhead_verdict(share) for share in (0.2, 0.15, 0.03, 0.005)] == [
        "none",
        "first",
        "parity",
        "stretch",
    ]
