"""A rank reads its share of a checkpoint, and needs memory for that and little more."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

# Loads one rank's share and prints by how much the process grew at its peak, in MiB. No collective
# is called while a model is loaded, so that a rank's place is all that it needs of its group.
LOAD = """
import sys
from pathlib import Path

import torch

from baton.models.loader import load_model
from baton.models.share import Share
from baton.parallel.group import Ranks, SoloGroup


class Seat(SoloGroup):
    def __init__(self, rank, size):
        self.rank, self.size = rank, size


def kib(field):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field))


folder, rank, size = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
torch.nn.functional.linear(torch.ones(4, 64), torch.ones(64, 64))
before = kib("VmHWM:")
share = Share(Ranks(tp=Seat(rank, size)))
model = load_model(folder, executor="torch", share=share)
print((kib("VmHWM:") - before) / 1024)
"""


def peak(folder: Path, rank: int, size: int) -> float:
    arguments = [sys.executable, "-c", LOAD, str(folder), str(rank), str(size)]
    run = subprocess.run(arguments, capture_output=True, text=True, timeout=240, check=False)
    assert run.returncode == 0, run.stderr
    return float(run.stdout)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_share_of_a_quarter_needs_the_memory_of_a_quarter(
    tmp_path: Path, write_llama: Callable[..., Path]
) -> None:
    """Peaks count mapped pages too: a rank that read a whole matrix of each layer would show."""
    folder = write_llama(
        tmp_path / "large",
        hidden_size=1024,
        intermediate_size=2816,
        num_hidden_layers=6,
        vocab_size=16000,
        num_key_value_heads=8,
        max_shard_size="100MB",
    )
    size = sum(file.stat().st_size for file in folder.glob("*.safetensors")) / 2**20
    # Beside the share: one matrix mapped, and a part of it copied before it is packed. The start
    # of torch may have had a peak of its own, of some tens of MiB.
    share = size / 4
    assert 0.25 * share < peak(folder, 3, 4) < share + 96
