"""The list of operations of a native program, under construction."""

from collections.abc import Sequence

from torch import Tensor

from baton.kernels.native.library import Kind, Matrix, Op
from baton.models.blocks.norms import norm_weight
from baton.models.decoder_spec import DecoderSpec
from baton.models.native_weights import NativeWeights
from baton.models.rope_spec import RopeSpec
from baton.models.spec import ModelSpec
from baton.models.weights import Checkpoint

_NONE = -1


class Operations:
    """Appends operations on buffers by name; a buffer is as wide as its widest use.

    The stream is the buffer that each layer adds to.
    """

    def __init__(self, spec: ModelSpec, checkpoint: Checkpoint, weights: NativeWeights) -> None:
        self.checkpoint = checkpoint
        self.weights = weights
        self.hidden = spec.hidden
        self.decoder: DecoderSpec = spec.decoder
        self.ropes: list[RopeSpec] = list(
            dict.fromkeys(layer.attention.rope for layer in spec.decoder.layers)
        )
        self.stream = "stream"
        self.list: list[Op] = []
        self.layer_ends: list[int] = []
        """Operations up to where each layer's KV is written."""
        self._widths: dict[str, int] = {}
        self._spreads: dict[str, int] = {}
        self._sampled = 0

    @property
    def widths(self) -> list[int]:
        """Columns of each buffer, by number."""
        return list(self._widths.values())

    @property
    def spreads(self) -> list[int]:
        """Rows per token of each buffer, by number."""
        return list(self._spreads.values())

    def append(
        self, kind: Kind, *, x: str = "", y: str = "", out: str = "", **fields: object
    ) -> None:
        """Append an operation; `out` without a name is the logits."""
        numbers = {"x": self._number(x), "y": self._number(y), "out": self._number(out)}
        self.list.append(Op(kind=kind, sampled=self._sampled, **numbers, **fields))

    def _number(self, buffer: str) -> int:
        return list(self._widths).index(buffer) if buffer else _NONE

    def room(self, buffer: str, width: int, spread: int = 1) -> str:
        """Make a buffer at least so wide, and with so many rows per token; return its name."""
        self._widths[buffer] = max(width, self._widths.get(buffer, 0))
        self._spreads[buffer] = max(spread, self._spreads.get(buffer, 0))
        return buffer

    def norm(self, name: str, x: str, out: str, width: int, *, eps: float | None = None) -> None:
        """Append out = norm(x), of the first `width` columns."""
        weight = norm_weight(self.checkpoint, name, width, self.decoder)
        self.append(
            Kind.NORM,
            x=x,
            out=self.room(out, width),
            width=width,
            weight=self.weights.floats(weight),
            eps=self.decoder.norm_eps if eps is None else eps,
        )

    def linear(
        self,
        x: str,
        out: str,
        parts: Sequence[tuple[str, int]],
        *,
        width: int,
        bias: bool = False,
        whole: str = "",
        add: bool = False,
    ) -> None:
        """Append out = x Wᵀ + bias, of the checkpoint's matrices; with `add`, out += that."""
        tensors, biases = self.checkpoint.take_parts(whole, parts, width=width, bias=bias)
        self.product(x, out, self.weights.matrix(tensors), biases, add=add)

    def product(
        self, x: str, out: str, matrix: Matrix, bias: Tensor | None = None, *, add: bool = False
    ) -> None:
        """Append out = x Wᵀ + bias; with `add`, out += that."""
        self.append(
            Kind.LINEAR,
            x=x,
            y=out if add else "",
            out=self.room(out, matrix.outputs),
            bias=self.weights.floats(bias),
            matrix=matrix,
        )

    def into_stream(
        self, x: str, parts: Sequence[tuple[str, int]], *, width: int, bias: bool, norm: str
    ) -> None:
        """Append stream += x Wᵀ + bias; with the name of a norm, of that first."""
        if not norm:
            self.linear(x, self.stream, parts, width=width, bias=bias, add=True)
            return
        self.linear(x, "branch", parts, width=width, bias=bias)
        self.norm(norm, "branch", "branch", self.hidden)
        self.append(Kind.ADD, x="branch", out=self.stream)

    def pick(self, heads_out: str, width: int) -> str:
        """Go on with the rows alone whose logits are wanted; return the new name of `heads_out`."""
        self._sampled = 1
        stream = self.room(f"sampled {self.stream}", self.hidden)
        picked = self.room(f"sampled {heads_out}", width)
        self.append(Kind.PICK, x=self.stream, out=stream, width=self.hidden)
        self.append(Kind.PICK, x=heads_out, out=picked, width=width)
        self.stream = stream
        return picked
