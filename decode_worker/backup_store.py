"""What a decode instance keeps for others: in its prefix cache, and nowhere else.

The own work goes first. Nothing is taken while a sequence waits for the engine, or where it would
take the last slot or the room that running sequences may need for their next block; and what is
taken is evicted, as all cache, before any sequence would have to wait for a block.
"""

import asyncio

from baton.core.errors import Incompatible
from baton.core.handover import Offer, Open
from baton.core.tasks import TaskSet
from baton.executor.instance import Instance
from baton.executor.prefix_pull import PrefixPull, PullTable

_AT_ONCE = 2
"""Offers that are read at once; more are told to come later, which costs their sender a pause."""


class BackupStore:
    """Takes what other decode instances offer."""

    def __init__(self, instance: Instance, tasks: TaskSet) -> None:
        self.pulls = PullTable()
        """Those that wait for room; the engine's listener tells it of grants."""
        self.declined = 0
        """Offers for which there was no room."""
        self._instance = instance
        self._tasks = tasks
        self._reading = 0

    def __repr__(self) -> str:
        return f"BackupStore({self._reading} reading, {self.pulls.blocks} blocks taken)"

    async def take(self, open_: Open, offer: Offer) -> int:
        """Read what the cache lacks of what is offered, if there is room for it.

        Returns how many blocks of the prompt, from the first, the cache has in the end. Raises
        Incompatible if this instance cannot keep them, or does not want to.
        """
        self._expect_alike(open_)
        known = self._known(open_)
        end = offer.first_block + len(offer.blocks)
        if not offer.first_block <= known < end:
            return known
        if not self._has_room(end - known, known):
            self.declined += 1
            return known
        pull = PrefixPull(self._instance, open_, offer, self.pulls)
        self._reading += 1
        task = self._tasks.start(pull.run())  # it outlives a caller that goes away
        task.add_done_callback(self._read)
        await asyncio.shield(task)
        return self._known(open_)

    def _read(self, _: object) -> None:
        self._reading -= 1

    def _known(self, open_: Open) -> int:
        size = self._instance.layout.block_size
        return self._instance.engine.known_tokens(open_.request) // size

    def _expect_alike(self, open_: Open) -> None:
        instance = self._instance
        name = instance.config.instance_id
        if instance.config.handover.backup != "peer":
            raise Incompatible(f"{name} keeps no backups")
        if open_.compatibility != instance.compatibility or open_.layout != instance.sharded:
            raise Incompatible(f"{name} keeps KV otherwise than {open_.decode_instance}")

    def _has_room(self, blocks: int, known: int) -> bool:
        """Whether the engine would grant the blocks at once, and still has room for its own."""
        roster = self._instance.engine.stats().scheduler.roster
        if self._reading >= _AT_ONCE or roster.waiting:
            return False
        if roster.running + roster.granted + 1 >= roster.slots:
            return False
        # The blocks that are known may be cached now, and are held while others are read.
        return roster.memory.pool.available >= known + blocks + roster.running
