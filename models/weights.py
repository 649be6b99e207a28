"""The tensors of a checkpoint folder, mapped into memory and handed out by name and shape."""

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

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


class Checkpoint:
    """All tensors of a folder; each is read when it is taken, and none may be left over.

    A tensor that is on disk in the wanted type is not copied: it is the file, mapped. The files
    must stay as they are for as long as a model that was made of them runs.
    """

    def __init__(self, model_dir: Path, dtype: torch.dtype) -> None:
        """Open the folder's weight files; raises InvalidConfig that names a damaged one."""
        self.dtype = dtype
        self._model_dir = model_dir
        self._files: dict[str, tuple[Any, str]] = {}
        self._taken: set[str] = set()
        for path in weight_files(model_dir):
            try:
                file = safe_open(path, framework="pt")
            except (SafetensorError, OSError) as error:
                raise InvalidConfig(path.name, str(path), f"a safetensors file ({error})") from None
            names: list[str] = file.keys()  # type: ignore[no-untyped-call]
            self._files |= dict.fromkeys(names, (file, path.name))

    def __repr__(self) -> str:
        return f"<Checkpoint {len(self._files)} tensors, {len(self._taken)} taken>"

    def __contains__(self, name: str) -> bool:
        return name in self._files

    def __iter__(self) -> Iterator[str]:
        return iter(self._files)

    def take(self, name: str, *shape: int) -> Tensor:
        """Return a tensor of the checkpoint's dtype.

        Raises InvalidConfig that names the tensor if it is missing, of another shape, or of a
        type other than float32, float16 and bfloat16.
        """
        return self._read(name, shape, _FLOATS).to(self.dtype)

    def take_stored(self, name: str, *shape: int) -> Tensor:
        """Return a tensor as it is on disk, mapped; raises as `take` does."""
        return self._read(name, shape, _FLOATS)

    def take_bytes(self, name: str, *shape: int) -> Tensor:
        """Return a tensor of bytes, as `take` does."""
        return self._read(name, shape, {"U8": torch.uint8})

    def _read(self, name: str, shape: tuple[int, ...], allowed: dict[str, torch.dtype]) -> Tensor:
        if name not in self._files:
            self._refuse("with all tensors of the model, but it lacks", [name])
        file, path = self._files[name]
        part = file.get_slice(name)
        if (found := tuple(part.get_shape())) != shape:
            wanted = f"shape {list(shape)}, as config.json"
            raise InvalidConfig(f"{path}: {name}", list(found), wanted)
        if (dtype := part.get_dtype()) not in allowed:
            raise InvalidConfig(f"{path}: {name}", dtype, ", ".join(sorted(allowed)))
        self._taken.add(name)
        tensor: Tensor = file.get_tensor(name)
        return tensor

    def take_parts(
        self, whole: str, parts: Sequence[tuple[str, int]], *, width: int, bias: bool
    ) -> tuple[list[Tensor], Tensor | None]:
        """Return what `take_fused` does, the matrices as they are on disk and not joined."""
        if f"{whole}.weight" in self:
            parts = [(whole, sum(count for _, count in parts))]
        weights = [self.take_stored(f"{name}.weight", rows, width) for name, rows in parts]
        biases = [(f"{name}.bias", (rows,)) for name, rows in parts]
        return weights, self._join(biases) if bias else None

    def take_fused(
        self, whole: str, parts: Sequence[tuple[str, int]], *, width: int, bias: bool
    ) -> tuple[Tensor, Tensor | None]:
        """Return matrices [rows, width] one below the other as one, and their biases as one.

        `parts` are the names of the matrices and their rows; some families keep them on disk as
        one already, under the name `whole`.
        """
        if f"{whole}.weight" in self or len(parts) == 1:
            stem = whole if len(parts) > 1 else parts[0][0]
            rows = sum(count for _, count in parts)
            weight = self.take(f"{stem}.weight", rows, width)
            return weight, self.take(f"{stem}.bias", rows) if bias else None
        weights = [(f"{name}.weight", (rows, width)) for name, rows in parts]
        biases = [(f"{name}.bias", (rows,)) for name, rows in parts]
        return self._join(weights), self._join(biases) if bias else None

    def _join(self, parts: Sequence[tuple[str, tuple[int, ...]]]) -> Tensor:
        """Return tensors one below the other, copied and converted in one go."""
        found = [self._read(name, shape, _FLOATS) for name, shape in parts]
        rows = sum(part.shape[0] for part in found)
        joined = torch.empty(rows, *found[0].shape[1:], dtype=self.dtype)
        for place, part in zip(
            torch.split(joined, [p.shape[0] for p in found]), found, strict=True
        ):
            place.copy_(part)
        return joined

    def finish(self, *, tie: bool, layers: int, spare_layers: int) -> None:
        """Raise InvalidConfig that names tensors that nobody took, and that nobody may miss.

        Not missed are: old rotary frequencies, the output matrix of a tied model, and the tensors
        of the `spare_layers` layers that come after the model's own.
        """
        spare = range(layers, layers + spare_layers)
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


def torch_dtype(name: str) -> torch.dtype:
    """Return torch's name for a key of ITEM_BYTES; raises InvalidConfig for any other."""
    if name not in ITEM_BYTES:
        raise InvalidConfig("dtype", name, ", ".join(ITEM_BYTES))
    found: torch.dtype = getattr(torch, name)
    return found
