"""The pages about deployment tell commands that Baton has, and files that are there."""

import re
import shlex
from pathlib import Path

import pytest
from typer.main import get_command

from baton.cli.main import app

ROOT = Path(__file__).resolve().parents[2]
PAGES = ("images", "ray", "runbooks")


def text_of(page: str) -> str:
    return (ROOT / "docs" / f"{page}.md").read_text()


def commands(page: str) -> list[list[str]]:
    """Return the arguments of each `baton …` in the page's console blocks."""
    blocks = "".join(re.findall(r"```console\n(.*?)```", text_of(page), re.DOTALL))
    lines = re.sub(r"\\\n", "", blocks).splitlines()
    found = (re.search(r"(?:^|[ /])baton ([a-z].*)", line.partition("   #")[0]) for line in lines)
    return [shlex.split(match[1].rstrip("'")) for match in found if match]


@pytest.mark.parametrize(("page", "least"), [("images", 1), ("ray", 5)])
def test_every_command_is_one_of_baton(page: str, least: int) -> None:
    found = commands(page)
    assert len(found) >= least
    for name, *arguments in found:
        command = get_command(app).commands[name]  # type: ignore[attr-defined]
        command.make_context(name, arguments)  # raises for what it does not know


@pytest.mark.parametrize("page", PAGES)
def test_every_command_in_the_text_is_one_of_baton(page: str) -> None:
    known = get_command(app).commands  # type: ignore[attr-defined]
    named = set(re.findall(r"`baton ([a-z]+)", text_of(page)))
    assert named
    assert named <= known.keys()


@pytest.mark.parametrize("page", PAGES)
def test_every_link_and_every_file_is_there(page: str) -> None:
    text = text_of(page)
    for link, anchor in re.findall(r"\]\(([^)#:]*)(?:#([\w-]+))?\)", text):
        path = (ROOT / "docs" / link) if link else ROOT / "docs" / f"{page}.md"
        assert path.exists(), link
        if anchor:
            titles = re.findall(r"^#+ (.+)$", path.read_text(), re.MULTILINE)
            assert anchor in {title.lower().replace(" ", "-") for title in titles}, anchor
    for name in re.findall(r"\bdeploy/[\w./-]+\w", text):
        assert (ROOT / name).exists(), name
