"""The revision names the weights, not the folder."""

import os
import shutil
from pathlib import Path

import pytest

from baton.core.errors import InvalidConfig
from baton.models.revision import revision


@pytest.fixture
def copy(tmp_path: Path, demo_model_dir: Path) -> Path:
    return Path(shutil.copytree(demo_model_dir, tmp_path / "copy"))


def flip(file: Path, offset: int) -> None:
    data = bytearray(file.read_bytes())
    data[offset] ^= 1
    file.write_bytes(data)


def test_a_copy_has_the_same_revision(copy: Path, demo_model_dir: Path) -> None:
    os.utime(copy / "model.safetensors", (1, 1))
    assert revision(copy) == revision(demo_model_dir)
    assert len(revision(copy)) == 32


@pytest.mark.parametrize("place", [0.0, 0.3, 0.5, 0.999999])
def test_one_changed_bit_changes_it(copy: Path, place: float) -> None:
    before, file = revision(copy), copy / "model.safetensors"
    flip(file, int(file.stat().st_size * place))
    assert revision(copy) != before


def test_config_and_length_count(copy: Path) -> None:
    first = revision(copy)
    with (copy / "config.json").open("a") as file:
        file.write("\n")
    second = revision(copy)
    with (copy / "model.safetensors").open("ab") as file:
        file.write(b"\0")
    assert len({first, second, revision(copy)}) == 3


def test_a_large_file_is_sampled_at_both_ends(copy: Path) -> None:
    file = copy / "model.safetensors"
    size = 200 << 20
    os.truncate(file, size)
    found = [revision(copy)]
    for offset in (0, size - 1):
        with file.open("r+b") as handle:
            handle.seek(offset)
            handle.write(b"\xab")
        found.append(revision(copy))
    assert len(set(found)) == 3


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_refuses_a_folder_that_lacks_a_file(copy: Path, name: str) -> None:
    (copy / name).unlink()
    with pytest.raises(InvalidConfig, match=name):
        revision(copy)
