"""The console in a real browser; skipped where there is none."""

import itertools
import json
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any

import httpx
import pytest

from baton.api.key_file import new_key
from baton.core.spans import DecodeSpans
from baton.core.trace import HandoverTrace, OfferTrace, RankTrace
from tests.api.console.chromium import Browser, Page, find_chromium

VIEWS = ("overview", "requests", "playground")
COMPLETION = {"model": "demo", "prompt": "hi", "max_tokens": 5}
MARKUP = "<b>x</b><img src=/nowhere onerror=alert(1)>"
OpenPage = Callable[..., Any]


@pytest.fixture(scope="module")
def chromium(tmp_path_factory) -> Iterator[Browser]:
    path = find_chromium()
    if path is None:
        pytest.skip("no Chromium is installed, and CHROMIUM does not name one")
    browser = Browser(path, tmp_path_factory.mktemp("chromium"))
    yield browser
    browser.close()


@pytest.fixture
async def open_page(chromium) -> AsyncIterator[OpenPage]:
    """Open the console of a front door; every page ends without an error in its log."""
    try:
        await chromium.ask("Browser.getVersion")
    except (ConnectionError, TimeoutError, BrokenPipeError) as error:
        pytest.skip(f"{find_chromium()} does not start here: {error!r}")
    pages: list[Page] = []

    async def make(door, view: str = "overview", **size: Any) -> Page:
        page = await chromium.page(**size)
        pages.append(page)
        await page.go(f"{door.http_url}/console/#{view}")
        return page

    yield make
    for page in pages:
        await page.close()
        assert page.complaints() == []


def text_of(selector: str) -> str:
    return f"(document.querySelector({json.dumps(selector)})?.textContent ?? '')"


def has(selector: str, text: str) -> str:
    return f"{text_of(selector)}.includes({json.dumps(text)})"


async def answered(door, **fields: Any) -> str:
    """Have a completion made, and return its id once its trace is there."""
    async with httpx.AsyncClient(base_url=door.http_url, timeout=60) as http:
        told = await http.post("/v1/completions", json=COMPLETION | fields)
    assert told.status_code == 200, told.text
    await door.gateway.idle()
    return told.json()["id"]


async def test_overview_shows_what_is_there_and_asks_nobody_else(open_page, front_door):
    await answered(front_door)
    page = await open_page(front_door)
    await page.until(has(".instance h4", "decode-0"))
    assert "Ready" in await page.run(text_of(".instance .badge"))
    assert "1 admitted" in await page.run(text_of("#tiles"))
    assert await page.run(text_of("#health")) == "Healthy"
    assert await page.run(text_of("#model")) == "demo"
    await page.until(has("#rate-chart .legend", "output"))
    assert await page.run("document.title") == "Overview · Baton console"
    assert all(url.startswith((front_door.http_url, "data:")) for url in page.urls())


async def test_a_waterfall_by_keyboard_alone(open_page, front_door, leader, text_script):
    handovers = (
        HandoverTrace("prefill-1", 0, "peer_lost"),
        HandoverTrace("prefill-0", 1, "ok", 0.001, 0.002, 0.01, 0.0, 0.004, 0.001, chunks=3,
                      blocks=5, bytes=5 << 20, transport="shm"),
    )  # fmt: skip
    older = await answered(front_door)
    leader.script = text_script("def add(a, b):", handovers=handovers)
    newer = await answered(front_door)
    page = await open_page(front_door)
    await page.until(has(".instance h4", "decode-0"))
    await page.run("document.querySelector('nav a').focus()")
    await page.press("Tab", code=9)
    await page.press("Enter", code=13)
    await page.until(has("#detail .id", newer))
    detail = await page.run(text_of("#detail"))
    assert "peer_lost" in detail
    assert "5.0\u202fMiB in 5 blocks of 3 chunks by shm" in detail
    assert "75\u202f% of it hidden" in detail
    await page.run("document.querySelector('#rows button').focus()")
    await page.press("ArrowDown", code=40)
    await page.until(has("#detail .id", older))
    assert "computed the prompt itself" in await page.run(text_of("#detail"))
    focus = "document.activeElement.dataset.focus"
    assert await page.run(focus) == older, "drawing the rows again has not lost the focus"


async def test_each_chunk_and_each_read_of_a_layer_group_is_drawn(
    open_page, front_door, leader, text_script
):
    offers = tuple(
        OfferTrace(layers, layers + 2, 4 * chunk, 4, begin, begin, begin + 0.002, 1 << 20)
        for chunk in range(3)
        for layers, begin in ((0, 0.004 + 0.004 * chunk), (2, 0.006 + 0.004 * chunk))
    )
    ranks = RankTrace(0, 4 << 20, 0.004, 0.02, 0.01), RankTrace(1, 2 << 20, 0.004, 0.01, 0.005)
    handover = HandoverTrace(
        "prefill-0", 0, "ok", 0.001, 0.002, 0.012, 0.0, 0.016, 0.004, chunks=3, blocks=12,
        bytes=6 << 20, transport="shm", offered_s=0.015, chunk_s=(0.004, 0.008, 0.012),
        offers=(*offers, OfferTrace(0, 4, 12, 1, 0.015)), ranks=ranks,
    )  # fmt: skip
    spans = DecodeSpans(handshake_s=0.001, prefill_queue_s=0.002, prefill_compute_s=0.012)
    leader.script = text_script("def add(a, b):", handovers=(handover,), spans=spans)
    await answered(front_door)
    page = await open_page(front_door, "requests")
    await page.until(has("#detail .waterfall", "Layers 3\u20134"))
    rows = await page.run(
        "[...document.querySelectorAll('.waterfall tbody tr')].map((row) =>"
        " [row.querySelector('th').textContent, row.querySelectorAll('.part').length])"
    )
    drawn = {name: bars for name, bars in rows if bars}
    assert drawn == {
        "Prefill computePrefill · 3 chunks on prefill-0": 3,
        "Layers 1\u20132Transfer · 3 reads, 3.0\u202fMiB": 3,
        "Layers 3\u20134Transfer · 3 reads, 3.0\u202fMiB": 3,
    }
    assert "rank 1 2.0\u202fMiB in 6.0\u202fms" in await page.run(text_of("#detail"))
    title = "document.querySelector('.w-transfer.part').title"
    assert await page.run(title) == "Blocks 0\u20133, 1.0\u202fMiB, 2.0\u202fms"


async def test_no_requests_yet(open_page, front_door):
    page = await open_page(front_door, "requests")
    await page.until(has("#rows", "No requests have ended yet."))
    assert "Choose a request" in await page.run(text_of("#detail"))


async def test_playground_streams_and_shows_the_waterfall(
    open_page, front_door, leader, text_script, tokenizer
):
    held = len(tokenizer.encode(MARKUP)) - 1
    leader.script = text_script(MARKUP, hold_after=held)
    page = await open_page(front_door, "playground")
    await page.until(has("#model", "demo"))
    await page.run("document.getElementById('prompt').select()")
    await page.type("hi")
    await page.press("Enter", code=13, modifiers=2)  # Ctrl
    await page.until(has("#play-state", "Streaming"))
    assert await page.run("document.getElementById('stop').disabled") is False
    leader.resume()
    await page.until("!document.getElementById('play-trace').hidden")
    assert await page.run(text_of("#answer")) == MARKUP, "text stays text"
    assert "Ended: length" in await page.run(text_of("#play-state"))
    assert "after the first" in await page.run(text_of("#play-trace .waterfall"))
    [submit] = leader.submits
    assert list(submit.request.prompt) == tokenizer.encode("hi")


async def test_playground_stops_chats_and_says_what_is_refused(
    open_page, front_door, leader, text_script
):
    leader.script = text_script("def add(a, b):", hold_after=2)
    page = await open_page(front_door, "playground")
    await page.until(has("#model", "demo"))
    await page.run("document.querySelector('[value=chat]').click()")
    await page.run("document.getElementById('send').click()")
    await page.until(has("#play-state", "Streaming"))
    await page.run("document.getElementById('stop').click()")
    await page.until(has("#play-state", "Stopped"))
    await page.until(has("#play-trace .badge", "cancelled"))
    assert (await page.run(text_of("#play-trace .id"))).startswith("chatcmpl-")
    await page.run("document.getElementById('max').value = 100000")
    await page.run("document.getElementById('send').click()")
    await page.until(has("#play-state", "Failed: max_tokens"))


async def test_with_api_keys_it_asks_and_shows_what_a_key_may_see(
    open_page, make_front_door, tmp_path
):
    keys = {name: new_key(name, admin=name == "ops") for name in ("acme", "ops")}
    path = tmp_path / "keys.json"
    entries = [entry.model_dump() for _, entry in keys.values()]
    path.write_text(json.dumps({"tenants": {name: {} for name in keys}, "keys": entries}))
    door = await make_front_door(api_keys=path)
    page = await open_page(door)

    async def use(key: str) -> None:
        await page.until("document.getElementById('key-dialog').open")
        await page.run("document.getElementById('key-input').focus()")
        await page.type(key)
        await page.press("Enter", code=13)

    await use("bt_wrong")
    await page.until(has("#key-why", "refused"))
    await use(keys["acme"][0])
    await page.until("!document.getElementById('forbidden').hidden")
    assert "the key of an admin" in await page.run(text_of("#forbidden"))
    await page.run("document.getElementById('key').click()")
    await use(keys["ops"][0])
    await page.until(has(".instance h4", "decode-0"))
    assert await page.run("document.getElementById('forbidden').hidden")
    assert await page.run("Object.values(sessionStorage)") == [keys["ops"][0]]
    assert await page.run("Object.values(localStorage)") == []
    assert not any(keys["ops"][0] in url for url in page.urls())


async def test_a_gateway_that_is_gone_is_said_and_what_was_known_stays(open_page, make_front_door):
    door = await make_front_door()
    page = await open_page(door)
    await page.until(has(".instance h4", "decode-0"))
    await page.go_offline(True)
    await page.until(has("#notice", "does not answer"))
    assert "decode-0" in await page.run(text_of(".instance h4"))
    assert await page.run(text_of("#health")) == "No connection"
    await page.go_offline(False)
    await page.until("document.getElementById('notice').hidden")


async def test_it_fits_a_phone_and_keeps_its_theme(open_page, front_door):
    await answered(front_door)
    page = await open_page(front_door, width=360, height=740, dark=True)
    await page.until(has(".instance h4", "decode-0"))
    ground = "getComputedStyle(document.body).backgroundColor"
    dark = await page.run(ground)
    for view in VIEWS:
        await page.run(f"document.querySelector('nav a[href=\"#{view}\"]').click()")
        await page.until(f"!document.getElementById('view-{view}').hidden")
        if view == "requests":
            await page.until("document.querySelector('.waterfall')")
        assert await page.run("document.documentElement.scrollWidth <= innerWidth"), view
    await page.run("document.getElementById('theme').click()")
    assert await page.run(text_of("#theme")) == "Theme: light"
    light = await page.run(ground)
    assert light != dark
    await page.go(f"{front_door.http_url}/console/?again")
    await page.until(has("#theme", "Theme: light"))
    assert await page.run(ground) == light


async def test_spans_add_up_to_the_time_to_first_token(open_page, front_door):
    page = await open_page(front_door)
    landed = {"prefill_instance": "p", "outcome": "ok", "handshake_s": 0.1, "queue_s": 0.2}
    landed |= {"compute_s": 0.4, "allocation_wait_s": 0.0, "transfer_s": 0.3, "exposed_s": 0.1}
    landed |= {"admission_wait_s": 0.1, "chunks": 2}
    trace = {"ttft_s": 1.0, "e2e_s": 3.0, "output_tokens": 5, "decode_instance": "d"}
    spans = {"tokenize": 0.1, "prefill_queue": 0.3, "prefill_compute": 0.5, "transfer": 0.1}
    for handovers, told in (([landed], {}), ([], {}), ([landed], {"ttft_spans": spans})):
        whole = trace | {"handovers": handovers, "local_prefill": not handovers} | told
        rows = await page.run(
            f"import('./spans.js').then((spans) => spans.rowsOf({json.dumps(whole)}))"
        )
        decode = rows.pop()
        assert (decode["name"], decode["start"], decode["length"]) == ("Decode", 1.0, 2.0)
        line = [row for row in rows if not row.get("overlaps")]
        assert sum(row["length"] for row in line) == pytest.approx(1.0)
        for row, following in itertools.pairwise(line):
            assert following["start"] == pytest.approx(row["start"] + row["length"])
        hidden = [row for row in rows if row.get("overlaps")]
        assert [row["length"] for row in hidden] == [pytest.approx(0.2)] * len(handovers)
