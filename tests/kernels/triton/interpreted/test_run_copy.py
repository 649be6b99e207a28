import numpy as np
import pytest
import torch

from baton.kernels.run_copy import grain_of, run_table
from baton.kernels.triton.run_copy import copy_runs


@pytest.mark.parametrize(("step", "grain"), [(16, 16), (4, 4), (1, 1)])
def test_runs_arrive_whole_and_nothing_else_changes(step, grain):
    random = np.random.default_rng(0)
    here = torch.get_default_device()
    memory = torch.from_numpy(random.integers(1, 256, 1 << 17, dtype=np.uint8)).to(here)
    offset = -memory.data_ptr() % 16
    source, target = memory[offset:], torch.zeros_like(memory)
    target = target[-target.data_ptr() % 16 :]
    lengths = np.array([step, 2048 * 4, 3 * 2048 + 7 * step, 40 * step], np.int64) // step * step
    come = np.array([50_000, 0, 20_000, 9_000], np.int64) // step * step
    go = np.array([7, 60_000, 30_000, 1_000], np.int64) // step * step
    table = run_table(go + target.data_ptr(), come + source.data_ptr(), lengths)
    assert grain_of(table) == grain
    copy_runs(table.to(here), int(lengths.max()), grain=grain)
    wanted = torch.zeros_like(target)
    for to, start, length in zip(go, come, lengths, strict=True):
        wanted[to : to + length] = source[start : start + length]
    assert target.equal(wanted)
