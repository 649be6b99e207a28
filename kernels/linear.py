"""y = x Wᵀ + b, with W laid out once for the processor where that pays."""

import platform

import torch
from torch import Tensor
from torch.nn import functional

from baton.kernels.backend import triton_serves

# oneDNN chooses its weight layout for a number of rows; measured, the layout for 32 is as fast
# as any other from 1 to 512 rows.
_ROWS = 32
# Rows up to which a product is a pass over W, for which Triton has a kernel.
_SKINNY = 64


class Linear:
    """A frozen linear layer.

    On x86 CPUs float32 weights are repacked for oneDNN: from 4 rows on it takes about half the
    time of torch's own matrix product, which reads the rows of W as they lie.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None = None) -> None:
        """Take weight [out, in] and bias [out]."""
        self.out_features, self.in_features = weight.shape
        self.bias = bias
        self._packed = _packable(weight)
        self._weight = (
            torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), _ROWS)
            if self._packed
            else weight
        )

    @property
    def weight(self) -> Tensor:
        """The weight [out, in], where it lies as it was given."""
        assert not self._packed, "repacked for the processor"
        return self._weight

    def __call__(self, x: Tensor) -> Tensor:
        """Return [rows, out] for x [rows, in]."""
        if self._packed:
            packed: Tensor = torch.ops.mkldnn._linear_pointwise(
                x, self._weight, self.bias, "none", [], ""
            )
            return packed
        if triton_serves(x) and x.shape[0] <= _SKINNY:
            from baton.kernels.triton.skinny_linear import skinny_linear

            return skinny_linear(x, self._weight, bias=self.bias)
        return functional.linear(x, self._weight, self.bias)

    def __repr__(self) -> str:
        kind = "packed" if self._packed else "plain"
        return f"<Linear {self.in_features} -> {self.out_features} {kind}>"


def _packable(weight: Tensor) -> bool:
    return (
        weight.device.type == "cpu"
        and weight.dtype == torch.float32
        and platform.machine() in ("x86_64", "AMD64")
        and not triton_serves(weight)
        and torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
    )
