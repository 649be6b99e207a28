import numpy as np
import pytest
import torch

from baton.kernels import kv_digest
from baton.kernels.kv_digest import Pieces, expand_key, hash_units, reference_hashes
from baton.kernels.kv_digest_device import DeviceBytes

KEY = expand_key(b"secret")


@pytest.mark.parametrize("native", [True, False])
def test_what_a_device_hashes_is_what_the_host_does(
    native: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not native:
        monkeypatch.setattr(kv_digest, "is_native", lambda: False)
    random = np.random.default_rng(0)
    memory = random.integers(0, 256, 1 << 17, np.uint8)
    lengths = np.array([4096] * 9 + [64] + [20] * 70 + [0], np.int64)
    offsets = random.integers(0, (memory.size - lengths) // 4) * 4
    pieces = Pieces(offsets, lengths, np.array([5, 9, 10, 80, 81, 81], np.int64))
    labels = random.integers(0, 256, (6, 64), np.uint8)
    found = hash_units(KEY, DeviceBytes(torch.from_numpy(memory)), pieces, labels)
    assert np.array_equal(found, reference_hashes(KEY, memory, pieces, labels))
    nothing = Pieces(offsets[:0], lengths[:0], pieces.ends[:0])
    assert DeviceBytes(torch.from_numpy(memory)).hash_units(KEY, nothing, labels[:0]).shape == (
        0,
        16,
    )


def test_pieces_that_are_not_in_memory_are_refused() -> None:
    memory = DeviceBytes(torch.zeros(4096, dtype=torch.uint8))
    at, length, end = (np.array([n], np.int64) for n in (4000, 128, 1))
    with pytest.raises(ValueError, match="outside of 4096 bytes"):
        memory.hash_units(KEY, Pieces(at, length, end), np.zeros((1, 64), np.uint8))
