"""Which safetensors files make up a checkpoint."""

from pathlib import Path

from baton.core.errors import InvalidConfig
from baton.models.config_file import read_json

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"


def weight_files(model_dir: Path) -> tuple[Path, ...]:
    """Return the checkpoint's weight files, sorted by name.

    Raises InvalidConfig that names the file that is missing, or an index that makes no sense.
    """
    if not (model_dir / INDEX).is_file():
        if not (model_dir / SINGLE).is_file():
            raise InvalidConfig(
                "model_dir", str(model_dir), f"a folder that holds the file {SINGLE} or {INDEX}"
            )
        return (model_dir / SINGLE,)
    shards = read_json(model_dir, INDEX).get("weight_map")
    if not isinstance(shards, dict) or not shards:
        raise InvalidConfig(f"{INDEX}: weight_map", shards, "an object from tensor to file")
    for name in shards.values():
        if not isinstance(name, str) or Path(name).name != name:
            raise InvalidConfig(f"{INDEX}: weight_map", name, "names of files in the same folder")
    names = sorted(set(shards.values()))
    for name in names:
        if not (model_dir / name).is_file():
            raise InvalidConfig(
                "model_dir", str(model_dir), f"a folder that holds the file {name}, as {INDEX} says"
            )
    return tuple(model_dir / name for name in names)
