import numpy as np
import pytest
import torch

from baton.kernels import kv_digest_device as device
from baton.kernels.kv_digest import Pieces, expand_key, hash_units
from baton.kernels.triton.kv_digest import unit_sums


@pytest.mark.parametrize(
    ("units", "grain"),
    [
        ([(1, 64)], 16),  # pieces, and bytes of each: one short chunk
        ([(6, 2048), (1, 12288)], 16),  # many chunks, the last of one line
        ([(3, 4096), (2, 64), (1, 4032)], 16),  # as many chunks as lines allow
        ([(7, 1240), (5, 20), (1, 4)], 1),  # lines of several pieces, the last one padded
    ],
)
def test_hashes_are_those_of_the_host(units, grain, monkeypatch):
    random = np.random.default_rng(0)
    memory = random.integers(0, 256, 1 << 16, np.uint8)
    lengths = np.concatenate([np.full(count, size) for count, size in units]).astype(np.int64)
    offsets = random.integers(0, (memory.size - lengths) // 4) * 4
    ends = np.cumsum([count for count, _ in units])
    labels = random.integers(0, 256, (len(units), 64), np.uint8)
    pieces, key = Pieces(offsets, lengths, ends), expand_key(b"secret")
    grains = []

    def launched(words, table, chunks):
        grains.append(table.grain)
        columns = table.offsets, table.units, table.labels, table.key
        found = unit_sums(words, *columns, chunks, grain=table.grain)
        assert found.equal(device.reference_unit_sums(words, table, chunks))
        return found

    monkeypatch.setattr(device, "_sums_of", launched)
    there = torch.from_numpy(memory).to(torch.get_default_device())
    found = device.DeviceBytes(there).hash_units(key, pieces, labels)
    assert grains == [grain]
    assert np.array_equal(found, hash_units(key, memory, pieces, labels))
