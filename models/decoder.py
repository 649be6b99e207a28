"""A decoder's forward pass over one ragged batch, whatever its family."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from baton.engine.step import LayerWatch
from baton.kernels.attention import Workspace
from baton.kernels.kv_pool import KVLayer, PagedLayer
from baton.kernels.paged_attention import PagedAttention
from baton.kernels.rope import rope_angles, rope_tables
from baton.models.blocks.device_step import DeviceRun, DeviceStep
from baton.models.blocks.layer import DecoderLayer
from baton.models.blocks.norms import Norm, load_norm
from baton.models.blocks.ring import Ring
from baton.models.blocks.step import KV, ModelInput, Step, StepUnderWay
from baton.models.blocks.vocabulary import Embedding, Head
from baton.models.share import Share
from baton.models.spec import ModelSpec
from baton.models.weights import Checkpoint, torch_dtype
from baton.parallel.expert_placement import Placement
from baton.parallel.token_rows import AllRows, TokenRows, token_rows


class Decoder:
    """A model with frozen weights, or the part of one that this rank computes."""

    def __init__(
        self,
        spec: ModelSpec,
        checkpoint: Checkpoint,
        *,
        dtype: str,
        threads: int,
        why: str = "as asked for",
        share: Share | None = None,
    ) -> None:
        """Take all tensors of the share; raises InvalidConfig that names what is not right.

        `why` tells the user why torch computes this model.
        """
        self.spec = spec
        self.dtype = dtype
        self.threads = threads
        """CPU threads of a forward pass; torch counts them per calling thread."""
        self.executor = f"torch ({why})"
        """Which executor this is, in words."""
        self.device = checkpoint.device
        """Where the weights are."""
        self.share = share = share or Share()
        """What of the model this rank computes."""
        decoder = spec.decoder
        self._load_ends(checkpoint)
        self._own = share.layers(spec)
        own = range(self._own.start, self._own.end)
        self._layers = [
            DecoderLayer(decoder, index, checkpoint, spec.hidden, share) for index in own
        ]
        checkpoint.finish(
            tie=decoder.tie, layers=spec.layers, spare_layers=decoder.spare_layers, own=own
        )
        ropes = dict.fromkeys(decoder.layers[index].attention.rope for index in own)
        self._ropes = {
            rope: torch.tensor(rope.frequencies, device=checkpoint.device) for rope in ropes
        }
        """On the device that the model is on."""

    def _load_ends(self, checkpoint: Checkpoint) -> None:
        """Take what the first and the last stage have."""
        spec, decoder, share = self.spec, self.spec.decoder, self.share
        embedding, norm, head = "model.embed_tokens.weight", "model.norm", "lm_head.weight"
        checkpoint.leave(*(embedding, f"{norm}.weight", head))
        shape, rows = (spec.vocab_size, spec.hidden), share.vocabulary(spec)
        self._embedding: Embedding | None = None
        self._norm: Norm | None = None
        self._head: Head | None = None
        if share.first or (share.last and decoder.tie):
            weight = checkpoint.take(embedding, *shape, cut=(rows,))
        if share.first:
            self._embedding = Embedding(weight, rows.start)
        if share.last:
            self._norm = load_norm(checkpoint, norm, spec.hidden, decoder)
            if not decoder.tie:
                weight = checkpoint.take(head, *shape, cut=(rows,))
            self._head = Head(weight, decoder.logit_softcap)

    def __repr__(self) -> str:
        spec, own = self.spec, f"{self.share.mesh}, layers {self._own.start} to {self._own.end - 1}"
        return f"<Decoder {spec.family}: {own}, hidden {spec.hidden}, {self.dtype}>"

    def stream_shape(self, tokens: int) -> tuple[int, int]:
        """Return the shape of what stages hand on for a step of so many tokens."""
        return self.rows(tokens).count, self.spec.hidden

    @property
    def expert_loads(self) -> dict[int, Tensor]:
        """How often this place's tokens have chosen each expert [experts], by layer with experts.

        Counted since the experts were placed. Summed over ep they are what
        `balanced_placement` takes.
        """
        loads = {
            index: layer.expert_loads for index, layer in enumerate(self._layers, self._own.start)
        }
        return {index: found for index, found in loads.items() if found is not None}

    def place_experts(self, placements: Mapping[int, Placement], checkpoint: Checkpoint) -> None:
        """Move experts to where `placements`, by layer of the model, say; others stay.

        All ranks of the instance do so between the same two steps.
        """
        for index, layer in enumerate(self._layers, self._own.start):
            if index in placements:
                layer.place_experts(placements[index], checkpoint)

    @torch.inference_mode()
    def join(self) -> None:
        """Take part in a step of other places along ep, with no tokens of the own."""
        nothing = torch.empty(
            0, self.spec.hidden, dtype=torch_dtype(self.dtype), device=self.device
        )
        for layer in self._layers:
            layer.join(nothing)

    @torch.inference_mode()
    def forward(
        self,
        batch: ModelInput,
        kv: Sequence[KVLayer],
        workspace: Workspace,
        watch: LayerWatch | None = None,
        stream: Tensor | None = None,
    ) -> Tensor:
        """Write the tokens' KV to the pool; return what the stage is for.

        That is, in the last stage, float32 logits [rows, the rank's tokens of the vocabulary]; rows
        are the batch's `sampled` tokens, perhaps none. In other stages it is the stream after the
        last layer, `stream_shape`, which the next stage takes as its `stream`. kv holds one entry
        per layer of the stage; `watch` counts the layers of the model.
        """
        rows = self.rows(batch.tokens.shape[0])
        if stream is None:
            stream = self.embed(batch.tokens, rows)
        ring = Ring(self.share.ranks.cp, batch.ring, workspace) if batch.ring else None
        angles = {
            rope: rope_angles(batch.positions, frequencies, stream.dtype, rope.magnitude)
            for rope, frequencies in self._ropes.items()
        }
        step = Step(batch.attention, angles, workspace, rows, ring)
        return self._run(stream, kv, step, batch.sampled, watch)

    @torch.inference_mode()
    def forward_device(
        self,
        step: DeviceStep,
        kv: Sequence[PagedLayer],
        watch: LayerWatch | None = None,
        stream: Tensor | None = None,
    ) -> Tensor:
        """Write the tokens' KV to the pool and return what `forward` does, through paged kernels.

        kv holds one entry per layer of the stage (kernels/kv_pool.py, paged_layers). Where
        `capturable` and the backend is Triton's, nothing is read on the host and no shape depends
        on values, so that the call can be captured in a CUDA graph for the shapes of `step`, with
        or without chunks of prompts; `watch` is then called as layers are captured, not as they
        run. Torch's backend computes the same (kernels/backend.py), and reads the device.
        """
        assert self.share.ranks.cp.size == 1, "rings of ranks are made by the host"
        run = self.device_run(step)
        if stream is None:
            stream = self.embed(step.tokens, run.rows)
        return self._run(stream, kv, run, step.sampled, watch)

    def device_run(self, step: DeviceStep) -> DeviceRun:
        """Return what the attention of all layers needs of a step on a device."""
        angles = {
            rope: rope_tables(step.positions, frequencies, rope.magnitude)
            for rope, frequencies in self._ropes.items()
        }
        rows = self.rows(step.tokens.shape[0])
        return DeviceRun(step.slots, angles, PagedAttention(step.batch), rows)

    @property
    def capturable(self) -> bool:
        """Whether `forward_device` may be captured in a CUDA graph, for steps of decodes.

        Experts at several places exchange as many rows as tokens choose, which the host must know.
        """
        return self.share.ranks.ep.size == 1

    def _run(
        self,
        stream: Tensor,
        kv: Sequence[KV],
        step: StepUnderWay[KV],
        sampled: Tensor | None,
        watch: LayerWatch | None,
    ) -> Tensor:
        """Return what the stage is for; `sampled` are the rows whose logits are wanted, or all."""
        rows = step.rows
        normed = self._layers[0].norm(stream)
        following = [*(layer.norm for layer in self._layers[1:]), self._norm]
        for index, layer in enumerate(self._layers, self._own.start):
            place = index - self._own.start
            heads_out = layer.attend(layer.project(normed, rows), kv[place], step)
            if watch is not None and index + 1 in watch.ends:
                watch.reached(index + 1)
            if index == self.spec.layers - 1:
                return self.end(stream, heads_out, rows, sampled)
            normed = self._finished(layer, stream, heads_out, rows, following[place])
        return stream

    def end(
        self, stream: Tensor, heads_out: Tensor, rows: TokenRows, sampled: Tensor | None
    ) -> Tensor:
        """Return the logits of `sampled` rows, or of all, from what the last layer's heads saw.

        From there on only these rows matter. `rows` says which rows of the stream are here.
        """
        stream = rows.gather(stream)
        if sampled is not None:
            stream, heads_out = stream[sampled], heads_out[sampled]
        rows = AllRows(self.share.ranks.tp, stream.shape[0])
        return self._logits(self._finished(self._layers[-1], stream, heads_out, rows, self._norm))

    def _finished(
        self,
        layer: DecoderLayer,
        stream: Tensor,
        heads_out: Tensor,
        rows: TokenRows,
        following: Norm | None,
    ) -> Tensor:
        """Return what `layer.finish` does, or no rows of none."""
        if stream.shape[0]:
            return layer.finish(stream, heads_out, rows, following)
        if self.share.ranks.ep.size > 1:
            layer.join(stream)
        return stream

    @property
    def layers(self) -> Sequence[DecoderLayer]:
        """The layers that this rank computes."""
        return self._layers

    def rows(self, tokens: int) -> TokenRows:
        """Return which rows of the stream this rank has in a step of so many tokens."""
        return token_rows(self.share.ranks.tp, tokens, self.share.scatter_from)

    def embed(self, tokens: Tensor, rows: TokenRows) -> Tensor:
        """Return this rank's rows of the stream before the first layer."""
        assert self._embedding is not None, "only the first stage takes tokens"
        stream = rows.reduce(self._embedding(tokens))
        scale = self.spec.decoder.embedding_scale
        return stream if scale == 1.0 else stream.mul_(scale)

    def _logits(self, normed: Tensor) -> Tensor:
        assert self._head is not None, "only the last stage has logits"
        if not normed.shape[0]:
            own = self.share.vocabulary(self.spec)
            return normed.new_empty(0, own.stop - own.start, dtype=torch.float32)
        return self._head(normed)
