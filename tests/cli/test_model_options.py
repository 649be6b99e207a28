"""What `--model` and `--name` say together."""

from pathlib import Path

import pytest

from baton.cli.defaults import DEMO_MODEL, DEMO_NAME
from baton.cli.model_options import models_of
from baton.core.config import ModelFolder
from baton.core.errors import InvalidConfig


def test_names_and_folders(tmp_path: Path) -> None:
    assert models_of((), "") == (ModelFolder(dir=DEMO_MODEL, name=DEMO_NAME),)
    assert models_of((), "mine") == (ModelFolder(dir=DEMO_MODEL, name="mine"),)
    (tmp_path / "a=b").mkdir()
    folder = str(tmp_path / "a=b")
    assert models_of((folder, "big,code,org/big=some/dir"), "") == (
        ModelFolder(dir=tmp_path / "a=b", name="a=b"),
        ModelFolder(dir=Path("some/dir"), name="big", aliases=("code", "org/big")),
    )
    assert models_of((folder,), "x") == (ModelFolder(dir=tmp_path / "a=b", name="x"),)


@pytest.mark.parametrize(
    ("values", "name", "field"),
    [
        (("=dir",), "", "--model"),
        (("name=",), "", "--model"),
        (("a,,b=dir",), "", "--model"),
        (("a=dir",), "b", "--name"),
        (("a", "b"), "c", "--name"),
    ],
)
def test_mistakes(values: tuple[str, ...], name: str, field: str) -> None:
    with pytest.raises(InvalidConfig, match=field):
        models_of(values, name)
