"""The tensors of a checkpoint folder, mapped into memory and handed out by name and shape."""

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from baton.core.errors import InvalidConfig
from baton.core.kv_layout import ITEM_BYTES
from baton.models.checkpoint_files import weight_files

_FLOATS = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_SHOWN = 3
# Older checkpoints carry the rotary frequencies, which follow from the config.
_IGNORED = re.compile(r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq")
_LAYER = re.compile(r"model\.layers\.(\d+)\.")

ALL = slice(None)
Cut = tuple[slice, ...]
"""What is wanted of each dimension of a tensor, from the first; of the rest all."""


class Rows(NamedTuple):
    """A matrix (without `.weight`), and which of its rows are wanted."""

    name: str
    total: int
    """Rows of the whole matrix."""
    wanted: slice = ALL


class Checkpoint:
    """All tensors of a folder; each is read when it is taken, and none may be left over.

    A whole tensor that is on disk in the wanted type is not copied: it is the file, mapped. The
    files must stay as they are for as long as a model that was made of them runs. A cut of a tensor
    is copied, from a mapping that is gone when it was: a rank that takes its share of every tensor
    needs memory for that share and one tensor at most, whatever the size of the checkpoint.
    """

    def __init__(
        self, model_dir: Path, dtype: torch.dtype, device: str | torch.device = "cpu"
    ) -> None:
        """Open the folder's weight files; raises InvalidConfig that names a damaged one.

        `device` is where tensors that are taken go, one by one; of those on `meta`, which have a
        shape and no memory, nothing is read.
        """
        self.dtype = dtype
        self.device = torch.device(device)
        self._model_dir = model_dir
        self._files: dict[str, tuple[Any, Path]] = {}
        self._taken: set[str] = set()
        for path in weight_files(model_dir):
            try:
                file = safe_open(path, framework="pt")
            except (SafetensorError, OSError) as error:
                raise InvalidConfig(path.name, str(path), f"a safetensors file ({error})") from None
            names: list[str] = file.keys()  # type: ignore[no-untyped-call]
            self._files |= dict.fromkeys(names, (file, path))

    def __repr__(self) -> str:
        return f"<Checkpoint {len(self._files)} tensors, {len(self._taken)} taken>"

    def __contains__(self, name: str) -> bool:
        return name in self._files

    def __iter__(self) -> Iterator[str]:
        return iter(self._files)

    def take(self, name: str, *shape: int, cut: Cut = ()) -> Tensor:
        """Return a tensor of the checkpoint's dtype, or a cut of it; `shape` is that of the whole.

        Raises InvalidConfig that names the tensor if it is missing, of another shape, or of a
        type other than float32, float16 and bfloat16.
        """
        if _is_whole(cut, shape):
            return self._read(name, shape, _FLOATS).to(self.device, self.dtype)
        return self._join([(name, shape, cut)])

    def take_stored(self, name: str, *shape: int) -> Tensor:
        """Return a tensor as it is on disk, mapped; raises as `take` does."""
        return self._read(name, shape, _FLOATS)

    def take_bytes(self, name: str, *shape: int, cut: Cut = ()) -> Tensor:
        """Return a tensor of bytes, or a mapped cut of it, as `take` does."""
        return self._read(name, shape, {"U8": torch.uint8}, cut).to(self.device)

    def leave(self, *names: str) -> None:
        """Count tensors as taken: other ranks need them."""
        self._taken.update(names)

    def _read(
        self, name: str, shape: tuple[int, ...], allowed: dict[str, torch.dtype], cut: Cut = ()
    ) -> Tensor:
        """Return a tensor mapped; a cut one in a mapping of its own."""
        if name not in self._files:
            self._refuse("with all tensors of the model, but it lacks", [name])
        file, path = self._files[name]
        part = file.get_slice(name)
        if (found := tuple(part.get_shape())) != shape:
            wanted = f"shape {list(shape)}, as config.json"
            raise InvalidConfig(f"{path.name}: {name}", list(found), wanted)
        if (dtype := part.get_dtype()) not in allowed:
            raise InvalidConfig(f"{path.name}: {name}", dtype, ", ".join(sorted(allowed)))
        self._taken.add(name)
        if self.device.type == "meta":
            return torch.empty(_cut_shape(cut, shape), dtype=allowed[dtype], device=self.device)
        if not _is_whole(cut, shape):
            own: Any = safe_open(path, framework="pt")
            part = own.get_slice(name)
        tensor: Tensor = part[cut] if cut else file.get_tensor(name)
        return tensor

    def take_parts(
        self, whole: str, parts: Sequence[tuple[str, int]], *, width: int, bias: bool
    ) -> tuple[list[Tensor], Tensor | None]:
        """Return what `take_fused` does, the matrices as they are on disk and not joined."""
        if f"{whole}.weight" in self:
            parts = [(whole, sum(count for _, count in parts))]
        weights = [self.take_stored(f"{name}.weight", rows, width) for name, rows in parts]
        biases = [(f"{name}.bias", (rows,), (ALL,)) for name, rows in parts]
        return weights, self._join(biases) if bias else None

    def take_fused(
        self, whole: str, parts: Sequence[Rows], *, width: int, bias: bool
    ) -> tuple[Tensor, Tensor | None]:
        """Return the wanted rows of matrices [rows, width] as one, and their biases as one.

        Some families keep the matrices on disk as one already, under the name `whole`.
        """
        pieces = [(part.name, part.total, part.wanted) for part in parts]
        if f"{whole}.weight" in self:
            pieces = _within_one(whole, parts)
        weights = [(f"{name}.weight", (rows, width), (cut,)) for name, rows, cut in pieces]
        biases = [(f"{name}.bias", (rows,), (cut,)) for name, rows, cut in pieces]
        return self._join(weights), self._join(biases) if bias else None

    def _join(self, parts: Sequence[tuple[str, tuple[int, ...], Cut]]) -> Tensor:
        """Return tensors one below the other, copied and converted in one go.

        A single tensor of which all is wanted need not be copied.
        """
        if len(parts) == 1 and _is_whole(parts[0][2], parts[0][1]):
            return self.take(parts[0][0], *parts[0][1])
        lengths = [_length(cut[0], shape[0]) for _, shape, cut in parts]
        joined: Tensor | None = None
        start = 0
        for (name, shape, cut), length in zip(parts, lengths, strict=True):
            found = self._read(name, shape, _FLOATS, cut)
            if joined is None:
                whole = (sum(lengths), *found.shape[1:])
                joined = torch.empty(whole, dtype=self.dtype, device=self.device)
            joined[start : start + length].copy_(found)
            start += length
            del found  # and its mapping, before the next one
        assert joined is not None
        return joined

    def finish(
        self, *, tie: bool, layers: int, spare_layers: int, own: range | None = None
    ) -> None:
        """Raise InvalidConfig that names tensors that nobody took, and that nobody may miss.

        Not missed are: old rotary frequencies, the output matrix of a tied model, the tensors of
        the `spare_layers` layers that come after the model's own, and of the model's layers that
        are not `own`.
        """
        spare = set(range(layers + spare_layers)).difference(range(layers) if own is None else own)
        left = []
        for name in self._files.keys() - self._taken:
            layer = _LAYER.match(name)
            if _IGNORED.fullmatch(name) or (tie and name == "lm_head.weight"):
                continue
            if layer is None or int(layer[1]) not in spare:
                left.append(name)
        if left:
            self._refuse("without unknown tensors, but it has", sorted(left))

    def _refuse(self, complaint: str, names: list[str]) -> None:
        rest = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
        shown = ", ".join(names[:_SHOWN]) + rest
        raise InvalidConfig("model_dir", str(self._model_dir), f"a checkpoint {complaint} {shown}")


def _length(cut: slice, count: int) -> int:
    return len(range(*cut.indices(count)))


def _cut_shape(cut: Cut, shape: tuple[int, ...]) -> tuple[int, ...]:
    cuts = (*cut, *(ALL,) * (len(shape) - len(cut)))
    return tuple(_length(part, n) for part, n in zip(cuts, shape, strict=True))


def _is_whole(cut: Cut, shape: tuple[int, ...]) -> bool:
    return all(_length(part, n) == n for part, n in zip(cut, shape, strict=False))


def _within_one(whole: str, parts: Sequence[Rows]) -> list[tuple[str, int, slice]]:
    """Return the wanted rows of matrices that lie one below the other in `whole`."""
    rows = sum(part.total for part in parts)
    if all(_is_whole((part.wanted,), (part.total,)) for part in parts):
        return [(whole, rows, ALL)]
    pieces, first = [], 0
    for part in parts:
        start, stop, _ = part.wanted.indices(part.total)
        pieces.append((whole, rows, slice(first + start, first + stop)))
        first += part.total
    return pieces


def torch_dtype(name: str) -> torch.dtype:
    """Return torch's name for a key of ITEM_BYTES; raises InvalidConfig for any other."""
    if name not in ITEM_BYTES:
        raise InvalidConfig("dtype", name, ", ".join(ITEM_BYTES))
    found: torch.dtype = getattr(torch, name)
    return found
