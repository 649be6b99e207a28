"""Copies what a decode instance has computed to its peers, so that they can go on if it dies.

 A, which decodes                                  B, its peer
   │ pins the full blocks of a sequence, digests     │
   │── Backup(tokens, blocks, digests) ─────────────▶│ has it all, or no room: says what it has
   │ ◀══════════════ reads the blocks that it lacks ═│ verifies, adopts: in its prefix cache
   │◀──────────────────────── blocks that B has now ─│
   │ unpins                                          │ holds nothing

B trusts nothing new: it reads, verifies and adopts as in a pull (executor/prefix_pull.py), and what
it then has is cache like any other, evicted when its room is needed. A dead A leaves nothing else.
"""

import asyncio
import contextlib
from collections.abc import Callable
from dataclasses import replace

import grpc

from baton.core.clock import Clock
from baton.core.errors import BatonError
from baton.core.handover import PROTOCOL_VERSION, BlockRef, Offer, OfferedBlock, Open
from baton.core.ids import Attempt, InstanceId, SeqId, new_ticket
from baton.core.log import get_logger
from baton.core.memory import MIB
from baton.core.tasks import TaskSet
from baton.decode_worker.backup_queue import BackupQueue, Portion
from baton.decode_worker.peer_channels import PeerChannels, PeerRef
from baton.engine.step import Pinned
from baton.executor.handover_orders import DigestOrder, HandoverTerms
from baton.executor.instance import Instance
from baton.executor.mesh_handover import MeshHandover
from baton.proto import worker_pb2 as pb
from baton.proto import worker_pb2_grpc as pb_grpc
from baton.proto.convert_backup import backup_proto
from baton.proto.errors import from_rpc_error

_SLACK_S = 2.0
"""For the answer, beyond what the peer's reads may take."""

_ATTEMPT = Attempt(0)
"""Each offer has a ticket of its own, and none is tried twice."""

_log = get_logger("backup")

Told = Callable[[int], None]
"""Hears how many tokens of its sequence the peer has by now."""


class Backups:
    """Follows the sequences that it is told of, one portion at a time."""

    def __init__(
        self, instance: Instance, channels: PeerChannels, tasks: TaskSet, clock: Clock
    ) -> None:
        config = instance.config.handover
        self.blocks = 0
        """That peers have read from here."""
        self.failed = 0
        """Portions that a peer could not be asked to take."""
        self._instance = instance
        self._channels = channels
        self._tasks = tasks
        self._clock = clock
        self._on = config.backup == "peer"
        self._most = config.backup_round_blocks
        self._queue = BackupQueue(
            block_size=instance.layout.block_size,
            every_blocks=config.backup_every_blocks,
            bytes_per_s=config.backup_mib_per_s * MIB,
        )
        self._told: dict[SeqId, Told] = {}
        self._changed = asyncio.Event()
        self._copying: asyncio.Task[None] | None = None

    def __repr__(self) -> str:
        return f"Backups({self._queue!r})"

    def follow(self, seq_id: SeqId, peer: PeerRef | None, tokens: int, told: Told) -> None:
        """Back up a sequence from now on, if that is wanted and there is a peer.

        It has `tokens` tokens before it grows. `told` is called until `forget`.
        """
        if self._on and peer is not None:
            self._told[seq_id] = told
            self._queue.follow(seq_id, peer, tokens)

    def grew(self, seq_id: SeqId) -> None:
        """The KV of one more token of a sequence is computed."""
        if seq_id in self._told:
            self._queue.grew(seq_id)
            self._wake()

    def forget(self, seq_id: SeqId) -> None:
        """A sequence has ended; does nothing if it is not followed."""
        if self._told.pop(seq_id, None) is not None:
            self._queue.forget(seq_id)
            self._wake()

    def _wake(self) -> None:
        self._changed.set()
        if self._copying is None and self._queue.next_at() is not None:
            self._copying = self._tasks.start(self._copy_all())

    async def _copy_all(self) -> None:
        """Copy one portion after the other, until nothing is due."""
        try:
            while (at := self._queue.next_at()) is not None:
                self._changed.clear()
                began = self._clock()
                portion = self._queue.take(began)
                if portion is None:
                    with contextlib.suppress(TimeoutError):
                        async with asyncio.timeout(at - began):
                            await self._changed.wait()
                    continue
                await self._copy(portion)
        finally:
            self._copying = None

    async def _copy(self, portion: Portion) -> None:
        """Let the peer read what it lacks of a sequence, and note what it has then."""
        engine, began = self._instance.engine, self._clock()
        pinned = engine.pin_committed(portion.seq_id)
        if pinned is None:
            return  # it was preempted: it is due again when it grows
        there: int | None = None
        try:
            if len(pinned.blocks) <= portion.first_block:
                return  # not computed again so far
            there = await self._offer(portion, pinned)
        except BatonError as error:
            self.failed += 1
            _log.info(
                "backup failed", peer=portion.peer.instance_id, code=error.code, why=error.message
            )
        finally:
            engine.release(pinned.seq_id)
        self._note(portion, there, began)

    def _note(self, portion: Portion, there: int | None, began: float) -> None:
        layout = self._instance.layout
        gained = max(0, (there or 0) - portion.first_block)
        self.blocks += gained
        self._queue.ended(portion, there, gained * layout.block_bytes, began)
        told = self._told.get(portion.seq_id)
        if gained and there and told is not None:
            told(there * layout.block_size)

    async def _offer(self, portion: Portion, pinned: Pinned) -> int:
        """Offer the next blocks of what is pinned; BatonError if the peer does not answer."""
        first = portion.first_block
        refs = pinned.blocks[first : first + self._most]
        end = first + len(refs)
        open_ = self._open(pinned, end)
        handover = self._new_handover(open_)
        try:
            offer = await self._digested(handover, first, refs)
            reply = await self._call(portion.peer, backup_proto(open_, offer))
        finally:
            await handover.close()  # until then the peer may read
        return min(int(reply.cached_blocks), end)

    async def _digested(
        self, handover: MeshHandover, first: int, refs: tuple[BlockRef, ...]
    ) -> Offer:
        layers = self._instance.layout.all_layers
        digests = await handover.digest(DigestOrder(layers, first, refs))
        return Offer(_ATTEMPT, 0, layers, first, tuple(map(OfferedBlock, refs, digests)))

    async def _call(self, peer: PeerRef, request: pb.BackupRequest) -> pb.BackupReply:
        timeout_s = self._instance.config.handover.read_timeout_s + _SLACK_S
        async with self._channels.channel(peer) as channel:
            try:
                reply: pb.BackupReply = await pb_grpc.DecodeStub(channel).Backup(
                    request, timeout=timeout_s
                )
            except grpc.aio.AioRpcError as error:
                raise from_rpc_error(error) from None
        return reply

    def _open(self, pinned: Pinned, blocks: int) -> Open:
        instance = self._instance
        prompt = pinned.tokens[: blocks * instance.layout.block_size + 1]
        return Open(
            version=PROTOCOL_VERSION,
            compatibility=instance.compatibility,
            layout=instance.sharded,
            decode_instance=InstanceId(instance.config.instance_id),
            decode_incarnation=instance.incarnation,
            ticket=new_ticket(),
            attempt=_ATTEMPT,
            request=replace(pinned.request, prompt=prompt, max_tokens=1, resumed=0),
            transports=instance.transports,
            place_blocks=instance.kv.num_blocks,
        )

    def _new_handover(self, open_: Open) -> MeshHandover:
        ours = open_.layout
        return self._instance.handover(
            HandoverTerms(ours, ours, open_.compatibility, open_.ticket, open_.request.prompt)
        )
