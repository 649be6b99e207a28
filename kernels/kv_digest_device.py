"""The hash of kernels/kv_digest.py of memory on a device: sums there, polynomials here.

What takes time is done where the bytes lie: `same` and `next` of each chunk, 16 bytes for 4 KiB,
which come to the host with one copy. On CUDA by a Triton kernel; elsewhere by torch, which is its
reference.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from baton.kernels.kv_digest import (
    CHUNK_LINES,
    KEY_LINES,
    LINE_BYTES,
    Digests,
    HashesItself,
    Labels,
    Pieces,
    check_pieces,
    hashes_of_sums,
)
from baton.kernels.native.kv_digest import Ints

_WORDS = LINE_BYTES // 4
_LOW = 0xFFFFFFFF


@dataclass(frozen=True, slots=True)
class UnitTable:
    """Units in words of 4 bytes, as kernels take them; all on the device."""

    offsets: Tensor
    """Of pieces, in words from the start of the memory [pieces] int64."""
    units: Tensor
    """Of each unit: its first piece, the words of each of its pieces, and in all [units, 3] int32.
    """
    labels: Tensor
    """[units, 16] int32."""
    key: Tensor
    """Its lines [66 * 16] int32."""
    grain: int
    """In how many words, 16 or 1, all pieces are."""


class DeviceBytes(HashesItself):
    """Implements `HashesItself` for bytes on a device; blocks until they are hashed."""

    def __init__(self, memory: Tensor) -> None:
        """`memory` is flat (uint8)."""
        assert memory.dtype == torch.uint8
        self._memory = memory

    def __repr__(self) -> str:
        return f"<DeviceBytes {self._memory.numel()} on {self._memory.device}>"

    def hash_units(self, key: bytes, pieces: Pieces, labels: Labels) -> Digests:
        """See HashesItself; on the current stream. Pieces of a unit have one length, in words.

        Raises ValueError as `hash_units` does.
        """
        check_pieces(pieces, pieces.offsets, self._memory.numel())
        if not pieces.ends.size:
            return hashes_of_sums(key, np.empty((0, 0, 2), np.int64), pieces.ends, pieces.ends)
        lengths, counts = _unit_lengths(pieces)
        sizes = lengths * counts
        chunks = -(-(-(-sizes // LINE_BYTES) + 1) // CHUNK_LINES)
        table = _table(key, pieces, labels, lengths, counts, self._memory.device)
        sums = _sums_of(self._memory.view(torch.int32), table, int(chunks.max()))
        return hashes_of_sums(key, sums.cpu().numpy(), chunks, sizes)


def reference_unit_sums(words: Tensor, table: UnitTable, chunks: int) -> Tensor:
    """Return [units, chunks, 2] int64: `same` and `next` of each chunk, 0 where a unit has fewer.

    `words` is the memory (int32). In plain torch, on any device.
    """
    sums = torch.zeros(len(table.units), chunks, 2, dtype=torch.int64, device=words.device)
    keys = (table.key.to(torch.int64) & _LOW).view(KEY_LINES, 8, 2)
    for unit, (first, length, total) in enumerate(table.units.tolist()):
        offsets = table.offsets[first : first + (total // length if length else 0)]
        index = offsets[:, None] + torch.arange(length, device=words.device)
        padding = words.new_zeros(-total % _WORDS)
        data = torch.cat([words[index.view(-1)], padding, table.labels[unit]])
        lines = (data.to(torch.int64) & _LOW).view(-1, 8, 2)
        for chunk in range(-(-len(lines) // CHUNK_LINES)):
            part = lines[chunk * CHUNK_LINES :][:CHUNK_LINES]
            keyed = (part + keys[1 : len(part) + 1]) & _LOW
            low, high = keyed[..., 0], keyed[..., 1]
            before = torch.cat([keys[:1, :, 0], low])
            after = torch.cat([high, keys[len(part) + 1 :, :, 1][:1]])
            sums[unit, chunk, 0] = (low * high).sum()
            sums[unit, chunk, 1] = (before * after).sum()
    return sums


def _sums_of(words: Tensor, table: UnitTable, chunks: int) -> Tensor:
    if not words.is_cuda:
        return reference_unit_sums(words, table, chunks)
    from baton.kernels.triton.kv_digest import unit_sums

    return unit_sums(
        words, table.offsets, table.units, table.labels, table.key, chunks, grain=table.grain
    )


def _unit_lengths(pieces: Pieces) -> tuple[Ints, Ints]:
    """Return the bytes of each unit's pieces, all alike, and how many it has."""
    counts = np.diff(pieces.ends, prepend=0)
    firsts = pieces.ends - counts
    lengths = np.where(counts > 0, np.append(pieces.lengths, 0)[firsts], 0)
    assert np.array_equal(np.repeat(lengths, counts), pieces.lengths), "pieces of unequal length"
    words = np.concatenate([pieces.offsets, pieces.lengths])
    assert not (words % 4).any(), "pieces that are not in whole words"
    return lengths, counts


def _table(
    key: bytes, pieces: Pieces, labels: Labels, lengths: Ints, counts: Ints, device: torch.device
) -> UnitTable:
    firsts = pieces.ends - counts
    units = np.stack([firsts, lengths // 4, lengths * counts // 4], axis=1).astype(np.int32)
    lines_of_key = np.frombuffer(key, "<i4", KEY_LINES * _WORDS)
    arrays = (
        (pieces.offsets // 4).view("<i4"),
        units.reshape(-1),
        np.ascontiguousarray(labels).reshape(-1).view("<i4"),
        lines_of_key,
    )
    # One copy for all of it: each costs a round trip. The offsets come first: they are 8 bytes.
    packed = torch.from_numpy(np.concatenate(arrays)).to(device)
    offsets, of_units, of_labels, of_key = torch.split(packed, [array.size for array in arrays])
    return UnitTable(
        offsets.view(torch.int64),
        of_units.view(-1, 3),
        of_labels.view(-1, _WORDS),
        of_key,
        grain=_WORDS if not (lengths % LINE_BYTES).any() else 1,
    )
