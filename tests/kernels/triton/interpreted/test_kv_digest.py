import numpy as np
import pytest
import torch

from baton.kernels import kv_digest as reference
from baton.kernels.triton.kv_digest import chunk_sums


@pytest.mark.parametrize(
    ("layers", "heads", "head_dim", "dtype"),
    [
        (slice(0, 1), slice(0, 1), 16, torch.bfloat16),  # one short chunk
        (slice(0, 3), slice(0, 4), 64, torch.bfloat16),  # many chunks, the last of one line
        (slice(1, 3), slice(1, 3), 80, torch.float32),  # chunks that no run ends with
        (slice(0, 2), slice(3, 4), 64, torch.float8_e4m3fn),
    ],
)
def test_sums_are_those_of_the_hash(layers, heads, head_dim, dtype):
    random = torch.Generator().manual_seed(0)
    pool = torch.randn((5, 3, 2, 4, 16, head_dim), generator=random).to(dtype)
    part = pool[:, layers, :, heads]
    blocks = torch.tensor([4, 0], dtype=torch.int32)
    labels = torch.randint(-(2**31), 2**31, (2, 16), generator=random, dtype=torch.int32)
    key = reference.expand_key(b"secret")
    lines_of_key = np.frombuffer(key, "<i4", reference.KEY_LINES * 16)
    found = chunk_sums(part, blocks, labels, torch.from_numpy(lines_of_key.copy()))
    for unit, block in enumerate(blocks.tolist()):
        data = part[block].contiguous().view(torch.uint8).flatten().numpy()
        lines = np.concatenate([data, labels[unit].view(torch.uint8).numpy()])
        expected = reference._chunk_sums(key, lines).view(np.int64)
        assert found[unit].flatten().tolist() == expected.tolist()
