"""Instances whose handovers have no digests, for bench/handover.py to compare with.

Python imports this before anything else in every process whose PYTHONPATH has this folder; it
changes the handover as soon as that is imported.
"""

import importlib.abc
import importlib.util
import sys
from collections.abc import Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

HANDOVER = "baton.executor.rank_handover"
DIGEST_BYTES = 16


def without_digests(handover: ModuleType) -> None:
    """Let prefill offer zeros, and decode take what it reads."""
    rank, key = handover.RankHandover, sys.modules["baton.kv_transfer.digest"].DigestKey
    held_units = sys.modules["baton.kv_transfer.units"].held_units
    transport = sys.modules["baton.kv_transfer.base"].BaseTransport
    read = transport.read

    def offered(self: Any, rank: Any, layers: Any, first: int, refs: Any, _: Any) -> list[bytes]:
        slots = [self._used_slots(number) for number in range(first, first + len(refs))]
        held = (held_units(self._plan, rank, layers, count, self._turn) for count in slots)
        return [bytes(DIGEST_BYTES * len(units.units)) for units in held]

    def read_unhashed(self: Any, peer: Any, runs: Any, _: Any = None, ticket: Any = b"") -> Any:
        return read(self, peer, runs, None, ticket)

    async def read_in_place(self: Any, order: Any) -> Any:
        transfers = self._post(order.layers, order.tokens, order.offered, order.blocks, 0)
        return await self._done(transfers.values())

    key.prepare = lambda self: None
    key.offered = offered
    rank._read_in_place = read_in_place
    transport.read = read_unhashed


class Finder(importlib.abc.MetaPathFinder):
    """Finds the module as it would be found, and changes it once it has run."""

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """See MetaPathFinder."""
        if name != HANDOVER:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        assert spec is not None, name
        assert spec.loader is not None, name
        run = spec.loader.exec_module

        def run_and_change(module: ModuleType) -> None:
            run(module)
            without_digests(module)

        spec.loader.exec_module = run_and_change  # type: ignore[method-assign]
        return spec


sys.meta_path.insert(0, Finder())
