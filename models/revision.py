"""A name for the weights themselves, by which two instances know that they hold the same."""

import os
from pathlib import Path

from baton.core.errors import InvalidConfig
from baton.core.hashing import hash_bytes
from baton.models.checkpoint_files import weight_files

_PIECE = 1 << 20
_PIECES = 64


def revision(model_dir: Path) -> str:
    """Return 32 hex digits over config.json and the weight files.

    Of each weight file, its size and 64 evenly spaced pieces of 1 MiB count, the first (with the
    header: every tensor's name, shape and place) and the last among them; files of up to 64 MiB
    count in full. Neither the folder's name nor the files' dates count.
    Raises InvalidConfig that names the file that is missing.
    """
    config = model_dir / "config.json"
    if not config.is_file():
        raise InvalidConfig("model_dir", str(model_dir), "a folder that holds the file config.json")
    parts = [hash_bytes(config.read_bytes())]
    parts += [_file_digest(path) for path in weight_files(model_dir)]
    return hash_bytes(*parts).hex()


def _file_digest(path: Path) -> bytes:
    with path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        pieces = []
        for number in range(_PIECES):
            file.seek(max(0, size - _PIECE) * number // (_PIECES - 1))
            pieces.append(hash_bytes(file.read(_PIECE)))
            if size <= _PIECE:
                break
    return hash_bytes(size.to_bytes(8, "little"), *pieces)
