import asyncio
import json
from collections.abc import Iterator

import pytest
import structlog

from baton.core import log
from baton.core.errors import InvalidConfig


@pytest.fixture(autouse=True)
def _as_it_was(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("BATON_LOG_FORMAT", "auto")
    monkeypatch.setenv("BATON_LOG_LEVEL", "info")
    yield
    structlog.reset_defaults()


def said(capsys: pytest.CaptureFixture[str]) -> list[dict[str, object]]:
    return [json.loads(line) for line in capsys.readouterr().err.splitlines()]


async def test_what_is_bound_is_on_every_line_of_the_task_and_on_no_other():
    async def seen() -> dict[str, object]:
        return structlog.contextvars.get_contextvars()

    with log.bound(tenant="acme", key="3f9a61c2b0de"):
        inside = await asyncio.create_task(seen())
    assert inside == {"tenant": "acme", "key": "3f9a61c2b0de"}
    assert await seen() == {}


async def test_a_tag_stays_with_its_task_and_those_it_starts(capsys: pytest.CaptureFixture[str]):
    log.choose(form="json", level="info")
    log.configure()
    logger = log.get_logger("test")

    async def child() -> None:
        logger.info("child")

    async def serve(request: str) -> None:
        log.tag(request=request)
        await asyncio.create_task(child())

    await asyncio.gather(serve("a"), serve("b"))
    logger.info("outside")
    *children, outside = said(capsys)
    assert sorted(str(line["request"]) for line in children) == ["a", "b"]
    assert "request" not in outside
    assert (outside["component"], outside["event"], outside["level"]) == ("test", "outside", "info")


@pytest.mark.parametrize(
    ("level", "shown"),
    [("debug", ["d", "i", "w"]), ("info", ["i", "w"]), ("error", [])],
)
def test_levels(level: str, shown: list[str], capsys: pytest.CaptureFixture[str]):
    log.choose(form="json", level=level)
    log.configure()
    logger = log.get_logger("test")
    logger.debug("d")
    logger.info("i")
    logger.warning("w")
    assert [line["event"] for line in said(capsys)] == shown


def test_text_is_no_json(capsys: pytest.CaptureFixture[str]):
    log.choose(form="text", level="info")
    log.configure()
    log.get_logger("test").info("something happened", number=5)
    [line] = capsys.readouterr().err.splitlines()
    assert "something happened" in line
    assert "number=5" in line


@pytest.mark.parametrize(("form", "level"), [("xml", "info"), ("json", "loud")])
def test_what_is_not_known_is_refused(form: str, level: str):
    with pytest.raises(InvalidConfig, match=r"xml|loud"):
        log.choose(form=form, level=level)


def test_a_bad_environment_is_refused(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("BATON_LOG_LEVEL", "loud")
    with pytest.raises(InvalidConfig, match=r"BATON_LOG_LEVEL.*debug, info, warning, error"):
        log.configure()
