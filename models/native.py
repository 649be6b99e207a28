"""A decoder as a program for the native step: built once from spec and checkpoint."""

from ctypes import Array

import numpy as np
from numpy.typing import NDArray

from baton.kernels.native.library import Kind, Library, Matrix, Op, Rotation
from baton.models.decoder_spec import LayerSpec, MlpSpec
from baton.models.native_attention import OUT, attention, mix
from baton.models.native_mlp import mlp
from baton.models.native_moe import mixture
from baton.models.native_ops import Operations
from baton.models.native_weights import NativeWeights
from baton.models.rope_spec import RopeSpec
from baton.models.spec import ModelSpec
from baton.models.weights import Checkpoint


class NativeDecoder:
    """A model with frozen weights whose forward pass is one call (kernels/native)."""

    def __init__(
        self,
        spec: ModelSpec,
        checkpoint: Checkpoint,
        library: Library,
        *,
        threads: int,
        dtype: str = "float32",
    ) -> None:
        """Take all tensors of the checkpoint; raises InvalidConfig that names what is not right.

        `dtype` is that of the products in linear layers and attention, and of the KV: float32, or
        bfloat16, whose sums are float32 all the same (kernels/native/bfloat16.h). The checkpoint's
        is float32 in both cases, which is what norms and biases are used in.
        """
        self.spec = spec
        self.dtype = dtype
        self.library = library
        self.threads = threads
        count = f"{threads} thread{'s' * (threads > 1)}"
        computes = dtype if dtype == "float32" else f"{dtype}{' with AMX' * library.amx}"
        self.executor = f"native, {library.instructions}, {computes}, {count}"
        """Which executor this is, in words."""
        self.weights = NativeWeights(library, dtype=dtype)
        ops = Operations(spec, checkpoint, self.weights)
        _forward(ops, spec)
        decoder = spec.decoder
        checkpoint.finish(tie=decoder.tie, layers=spec.layers, spare_layers=decoder.spare_layers)
        self.ops = (Op * len(ops.list))(*ops.list)
        self.layer_ends = tuple(ops.layer_ends)
        """For each layer, how many operations it takes until its KV is written."""
        self.widths = ops.widths
        """Columns of each buffer."""
        self.spreads = ops.spreads
        """Rows per token of each buffer."""
        self._frequencies = [np.array(rope.frequencies, dtype=np.float32) for rope in ops.ropes]
        self.rotations = _rotations(ops.ropes, self._frequencies)

    def __repr__(self) -> str:
        spec = self.spec
        return f"<NativeDecoder {spec.family}: {spec.layers} layers, hidden {spec.hidden}>"


def _rotations(ropes: list[RopeSpec], frequencies: list[NDArray[np.float32]]) -> Array[Rotation]:
    found = [
        Rotation(f.ctypes.data, len(f), rope.magnitude)
        for f, rope in zip(frequencies, ropes, strict=True)
    ]
    return (Rotation * len(found))(*found)


def _forward(ops: Operations, spec: ModelSpec) -> None:
    """Append the whole forward pass."""
    ops.append(Kind.PLACE)
    for table in range(len(ops.ropes)):
        ops.append(Kind.ANGLES, table=table)
    head = _embed(ops, spec)
    for index, layer in enumerate(spec.decoder.layers):
        _layer(ops, index, layer)
    ops.norm("model.norm", ops.stream, "normed", spec.hidden)
    ops.append(Kind.LINEAR, x="normed", matrix=head)
    if (cap := spec.decoder.logit_softcap) is not None:
        ops.append(Kind.SOFTCAP, scale=cap)


def _embed(ops: Operations, spec: ModelSpec) -> Matrix:
    """Append the embedding; return the output matrix, from which a tied one is read."""
    scale, width = spec.decoder.embedding_scale, spec.hidden
    out = ops.room(ops.stream, width)
    table = ops.checkpoint.take_stored("model.embed_tokens.weight", spec.vocab_size, width)
    if spec.decoder.tie:
        head = ops.weights.matrix([table])
        ops.append(Kind.EMBED, out=out, width=width, scale=scale, matrix=head)
        return head
    address, stored = ops.weights.table(table)
    ops.append(Kind.EMBED, out=out, width=width, scale=scale, weight=address, stored=stored)
    head_rows = ops.checkpoint.take_stored("lm_head.weight", spec.vocab_size, width)
    return ops.weights.matrix([head_rows])


def _layer(ops: Operations, index: int, layer: LayerSpec) -> None:
    """Append one layer; see models/blocks/layer.py."""
    prefix = f"model.layers.{index}."
    ops.norm(f"{prefix}input_layernorm", ops.stream, "normed", ops.hidden)
    width, heads_out = attention(ops, layer.attention, index, f"{prefix}self_attn."), OUT
    ops.layer_ends.append(len(ops.list))
    if index == len(ops.decoder.layers) - 1:  # from here on only the sampled rows matter
        heads_out = ops.pick(OUT, width)
    before, after_attention, after_mlp = "post_attention_layernorm", "", ""
    if layer.sandwich:
        before = "pre_feedforward_layernorm"
        after_attention = f"{prefix}post_attention_layernorm"
        after_mlp = f"{prefix}post_feedforward_layernorm"
    mix(ops, layer.attention, heads_out, f"{prefix}self_attn.", after_attention)
    ops.norm(prefix + before, ops.stream, "normed", ops.hidden)
    if isinstance(layer.mlp, MlpSpec):
        mlp(ops, layer.mlp, f"{prefix}mlp.", after_mlp)
    else:
        mixture(ops, layer.mlp, prefix)
