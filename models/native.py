"""A decoder as a program for the native step: built once from spec and checkpoint."""

import ctypes
from collections.abc import Sequence

import numpy as np
import torch

from baton.kernels.native.build import NoNativeCode
from baton.kernels.native.library import Gate, Kind, Library, Matrix, Op, Rotation
from baton.models.blocks.norms import norm_weight
from baton.models.decoder_spec import AttentionSpec, DecoderSpec, LayerSpec, MlpSpec
from baton.models.native_weights import NativeWeights
from baton.models.rope_spec import RopeSpec
from baton.models.spec import ModelSpec
from baton.models.weights import Checkpoint

_NONE = -1
_GATES = {"silu": Gate.SILU, "gelu_tanh": Gate.GELU_TANH}


class NativeDecoder:
    """A model with frozen weights whose forward pass is one call (kernels/native)."""

    dtype = "float32"

    def __init__(
        self, spec: ModelSpec, checkpoint: Checkpoint, library: Library, *, threads: int
    ) -> None:
        """Take all tensors of the checkpoint; raises InvalidConfig that names what is not right."""
        refuse_what_is_not_native(spec)
        self.spec = spec
        self.library = library
        self.threads = threads
        count = f"{threads} thread{'s' * (threads > 1)}"
        self.executor = f"native, {library.instructions}, {count}"
        """Which executor this is, in words."""
        builder = _Builder(spec, checkpoint, NativeWeights(library))
        builder.build()
        self._weights = builder.weights
        self.ops = (Op * len(builder.ops))(*builder.ops)
        self.widths = list(builder.widths.values())
        """Columns of each buffer."""
        self._frequencies = [np.array(rope.frequencies, dtype=np.float32) for rope in builder.ropes]
        rotations = [
            Rotation(f.ctypes.data, len(f), rope.magnitude)
            for f, rope in zip(self._frequencies, builder.ropes, strict=True)
        ]
        self.rotations = (Rotation * len(rotations))(*rotations)

    def __repr__(self) -> str:
        spec = self.spec
        return f"<NativeDecoder {spec.family}: {spec.layers} layers, hidden {spec.hidden}>"


def refuse_what_is_not_native(spec: ModelSpec) -> None:
    """Raise NoNativeCode that names a part of the model that the native step cannot compute."""
    for layer in spec.decoder.layers:
        if not isinstance(layer.attention, AttentionSpec):
            raise NoNativeCode(f"{spec.family} has latent attention")
        if not isinstance(layer.mlp, MlpSpec):
            raise NoNativeCode(f"{spec.family} has a mixture of experts")


class _Builder:
    """Appends operations; buffers are named, and as wide as their widest use."""

    def __init__(self, spec: ModelSpec, checkpoint: Checkpoint, weights: NativeWeights) -> None:
        self.spec = spec
        self.weights = weights
        self.ops: list[Op] = []
        self.widths: dict[str, int] = {}
        self.ropes: list[RopeSpec] = list(
            dict.fromkeys(layer.attention.rope for layer in spec.decoder.layers)
        )
        self._decoder: DecoderSpec = spec.decoder
        self._checkpoint = checkpoint
        self._stream = "hidden"
        self._sampled = 0

    def build(self) -> None:
        """Append the whole forward pass; logits are the buffer after the last."""
        spec, decoder = self.spec, self._decoder
        self.op(Kind.PLACE)
        for table in range(len(self.ropes)):
            self.op(Kind.ANGLES, table=table)
        head = self._embed()
        for index, layer in enumerate(decoder.layers):
            self._layer(index, layer)
        self._norm("model.norm", self._stream, "normed", spec.hidden)
        logits = len(self.widths)
        self._append(
            Op(kind=Kind.LINEAR, x=self._number("normed"), y=_NONE, out=logits, matrix=head)
        )
        if decoder.logit_softcap is not None:
            self._append(Op(kind=Kind.SOFTCAP, out=logits, scale=decoder.logit_softcap))
        self._checkpoint.finish(
            tie=decoder.tie, layers=spec.layers, spare_layers=decoder.spare_layers
        )

    def op(self, kind: Kind, *, x: str = "", y: str = "", out: str = "", **fields: object) -> None:
        """Append an operation on buffers by name."""
        numbers = {
            name: self._number(buffer) if buffer else _NONE
            for name, buffer in (("x", x), ("y", y), ("out", out))
        }
        self._append(Op(kind=kind, **numbers, **fields))

    def _append(self, op: Op) -> None:
        op.sampled = self._sampled
        self.ops.append(op)

    def _number(self, buffer: str) -> int:
        return list(self.widths).index(buffer)

    def _room(self, buffer: str, width: int) -> str:
        self.widths[buffer] = max(width, self.widths.get(buffer, 0))
        return buffer

    def _embed(self) -> Matrix:
        """Append the embedding; return the output matrix, from which a tied one is read."""
        spec, scale = self.spec, self._decoder.embedding_scale
        shape, width = (spec.vocab_size, spec.hidden), spec.hidden
        out = self._room("hidden", width)
        table = self._checkpoint.take_stored("model.embed_tokens.weight", *shape)
        if self._decoder.tie:
            head = self.weights.matrix([table])
            self.op(Kind.EMBED, out=out, width=width, scale=scale, matrix=head)
            return head
        address, stored = self.weights.table(table)
        self.op(Kind.EMBED, out=out, width=width, scale=scale, weight=address, stored=stored)
        return self.weights.matrix([self._checkpoint.take_stored("lm_head.weight", *shape)])

    def _layer(self, index: int, layer: LayerSpec) -> None:
        prefix, hidden = f"model.layers.{index}.", self.spec.hidden
        last = index == len(self._decoder.layers) - 1
        self._norm(f"{prefix}input_layernorm", self._stream, "normed", hidden)
        assert isinstance(layer.attention, AttentionSpec)
        self._heads_out(layer.attention, index, f"{prefix}self_attn.")
        if last:
            self._pick(layer.attention.heads * layer.attention.head_dim)
        after, before = ("post_attention_layernorm", "post_attention_layernorm")
        if layer.sandwich:
            before = "pre_feedforward_layernorm"
        self._mix(layer.attention, f"{prefix}self_attn.", prefix + after if layer.sandwich else "")
        self._norm(prefix + before, self._stream, "normed", hidden)
        assert isinstance(layer.mlp, MlpSpec)
        back = f"{prefix}post_feedforward_layernorm" if layer.sandwich else ""
        self._mlp(layer.mlp, f"{prefix}mlp.", back)

    def _norm(self, name: str, x: str, out: str, width: int) -> None:
        weight = norm_weight(self._checkpoint, name, width, self._decoder)
        self.op(
            Kind.NORM,
            x=x,
            out=self._room(out, width),
            width=width,
            weight=self.weights.floats(weight),
            eps=self._decoder.norm_eps,
        )

    def _linear(
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
        """Append out = x Wᵀ + bias, added to what is in `out` if `add`."""
        tensors, biases = self._checkpoint.take_parts(whole, parts, width=width, bias=bias)
        self.op(
            Kind.LINEAR,
            x=x,
            y=out if add else "",
            out=self._room(out, sum(rows for _, rows in parts)),
            bias=self.weights.floats(biases),
            matrix=self.weights.matrix(tensors),
        )

    def _into_stream(
        self, x: str, parts: Sequence[tuple[str, int]], *, width: int, bias: bool, norm: str
    ) -> None:
        """Append stream += x Wᵀ + bias, perhaps normed before it is added."""
        if not norm:
            self._linear(x, self._stream, parts, width=width, bias=bias, add=True)
            return
        self._linear(x, "branch", parts, width=width, bias=bias)
        self._norm(norm, "branch", "branch", self.spec.hidden)
        self.op(Kind.ADD, x="branch", out=self._stream)

    def _heads_out(self, spec: AttentionSpec, layer: int, prefix: str) -> None:
        q, kv = spec.heads * spec.head_dim, spec.kv_heads * spec.head_dim
        parts = [(f"{prefix}{name}_proj", rows) for name, rows in (("q", q), ("k", kv), ("v", kv))]
        whole, width = f"{prefix}qkv_proj", self.spec.hidden
        self._linear("normed", "qkv", parts, width=width, bias=spec.bias, whole=whole)
        self.op(
            Kind.HEADS,
            x="qkv",
            layer=layer,
            heads=spec.heads,
            table=self.ropes.index(spec.rope),
            weight=self._head_norms(spec, prefix) if spec.qk_norm else None,
            eps=self._decoder.norm_eps,
        )
        sinks = self._checkpoint.take(f"{prefix}sinks", spec.heads) if spec.sinks else None
        self.op(
            Kind.ATTEND,
            x="qkv",
            out=self._room("heads_out", q),
            layer=layer,
            heads=spec.heads,
            width=spec.head_dim,
            window=spec.window or 0,
            scale=spec.scale,
            limit=spec.softcap or 0.0,
            weight=self.weights.floats(sinks),
        )

    def _head_norms(self, spec: AttentionSpec, prefix: str) -> int | None:
        """Return the address of weights [heads + kv_heads, head_dim]."""
        rows = []
        for name, heads in (("q", spec.heads), ("k", spec.kv_heads)):
            weight = norm_weight(
                self._checkpoint, f"{prefix}{name}_norm", spec.head_dim, self._decoder
            )
            rows.append(weight.expand(heads, -1))
        return self.weights.floats(torch.cat(rows))

    def _pick(self, width: int) -> None:
        """From here on only the rows matter whose logits are wanted."""
        self._sampled = 1
        for buffer, columns in ((self._stream, self.spec.hidden), ("heads_out", width)):
            out = self._room(f"sampled {buffer}", columns)
            self.op(Kind.PICK, x=buffer, out=out, width=columns)
        self._stream = f"sampled {self._stream}"

    def _mix(self, spec: AttentionSpec, prefix: str, norm: str) -> None:
        x = "sampled heads_out" if self._sampled else "heads_out"
        parts, width = [(f"{prefix}o_proj", self.spec.hidden)], spec.heads * spec.head_dim
        self._into_stream(x, parts, width=width, bias=spec.out_bias, norm=norm)

    def _mlp(self, spec: MlpSpec, prefix: str, norm: str) -> None:
        wide, hidden = spec.intermediate, self.spec.hidden
        parts = [(f"{prefix}gate_proj", wide), (f"{prefix}up_proj", wide)]
        whole = f"{prefix}gate_up_proj"
        self._linear("normed", "gate_up", parts, width=hidden, bias=spec.bias, whole=whole)
        self.op(
            Kind.GATE,
            x="gate_up",
            out=self._room("gated", wide),
            width=wide,
            gate=_GATES[spec.activation],
        )
        down = [(f"{prefix}down_proj", hidden)]
        self._into_stream("gated", down, width=wide, bias=spec.bias, norm=norm)
