"""The one pass against its three operations, by native code and by torch."""

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from baton.kernels import add_rms_norm
from baton.kernels.add_rms_norm import add_rms_norm_, is_native
from baton.kernels.native.build import NoNativeCode

EPS = 1e-5


@pytest.fixture(params=["native", "torch"])
def _way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    if request.param == "torch":

        def refuse() -> None:
            raise NoNativeCode("no compiler")

        monkeypatch.setattr(add_rms_norm, "load_add_norm", refuse)
        is_native.cache_clear()
    elif not is_native():
        pytest.skip("no C++ compiler")
    yield
    is_native.cache_clear()


def drawn(seed: int, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.mark.usefixtures("_way")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("count", [1, 2, 3, 9])
@pytest.mark.parametrize("shape", [(0, 64), (1, 1), (3, 37), (5, 256)])
def test_it_is_the_sum_the_residual_and_the_norm(
    shape: tuple[int, int], count: int, dtype: torch.dtype
) -> None:
    addends = [drawn(i, *shape, dtype=dtype) for i in range(count)]
    kept = [x.clone() for x in addends]
    stream, weight = drawn(100, *shape, dtype=dtype), drawn(101, shape[1], dtype=dtype)
    # As documented: added in float32 and in order, rounded, added and rounded again.
    total = addends[0].float()
    for x in addends[1:]:
        total = total + x.float()
    expected = stream + total.to(dtype)
    normed = add_rms_norm_(addends, stream, weight, EPS)
    assert torch.equal(stream, expected), "the stream has the bits of single operations"
    wide = expected.double()
    reference = wide / (wide.square().mean(-1, keepdim=True) + EPS).sqrt() * weight.double()
    loose = 2e-2 if dtype == torch.bfloat16 else 1e-5
    torch.testing.assert_close(normed, reference.to(dtype), rtol=loose, atol=1e-5)
    assert all(torch.equal(x, y) for x, y in zip(addends, kept, strict=True)), "addends were read"
