"""The demo's screen: what it draws and says of known measurements, and the demo itself."""

import io
from collections.abc import Callable
from typing import Any

import pytest
from rich.console import Console

from baton.cli.demo.prompts import LONG_TOKENS, Prompt, demo_prompts
from baton.cli.demo.record import Record
from baton.cli.demo.screen import Lines, Panels
from baton.cli.demo.story import row, sentences
from baton.cli.demo.timeline import CHART, COMPUTE, DECODE, READ, WAIT, Axis, lanes, size

Start = Callable[..., Any]


def record(number: int, *, sent: float, arrivals: list[float], **handover: object) -> Record:
    found = {
        "prefill_instance": "prefill-0",
        "outcome": "ok",
        "queue_s": 1.0,
        "compute_s": 4.0,
        "transfer_s": 0.5,
        "exposed_s": 0.1,
        "overlapped": 0.8,
        "chunks": 4,
        "blocks": 10,
        "bytes": 2_000_000,
        "transport": "cma",
        **handover,
    }
    return Record(
        Prompt(f"prompt {number}", "text", "text", 8),
        sent=sent,
        arrivals=arrivals,
        text="a\nb",
        trace={
            "prompt_tokens": 100 * number,
            "output_tokens": len(arrivals),
            "decode_instance": "decode-0",
            "ttft_s": arrivals[0] - sent,
            "tpot_s": 0.025,
            "handovers": [found] if handover.get("blocks") != 0 else [],
        },
    )


def test_lanes_show_each_phase_where_it_was() -> None:
    axis = Axis(10.0)
    (prefill, work, in_tokens), (_, wire, moved), (decode, stream, out_tokens) = lanes(
        axis, record(3, sent=1.0, arrivals=[6.5, 8.0, 9.5])
    )
    assert (prefill, decode) == ("prefill-0", "decode-0")
    assert work.index(WAIT) == axis.column(1.0)
    assert work.index(COMPUTE) == axis.column(2.0)
    assert work.rindex(COMPUTE) == axis.column(6.0)
    assert [i for i, c in enumerate(wire) if c == READ] == [axis.column(s) for s in (3, 4, 5, 6)]
    assert stream.index(DECODE) == axis.column(6.5)
    assert stream.rindex(DECODE) == axis.column(9.5)
    assert {len(work), len(wire), len(stream)} == {CHART}
    assert (in_tokens, moved, out_tokens) == ("300 tokens", "10 blocks, 2.0 MB", "3 tokens")


def test_a_prompt_computed_in_place_has_no_wire() -> None:
    local = record(1, sent=0.0, arrivals=[1.0], blocks=0)
    assert [label for label, _, _ in lanes(Axis(1.0), local)] == ["decode-0"]
    assert "none: computed in place" in row(0, local)
    assert list(sentences([local], [])) == []


def test_the_sentences_tell_what_was_measured() -> None:
    long = record(9, sent=0.0, arrivals=[5.5, 5.6])  # computed from 1 to 5
    other = record(1, sent=0.0, arrivals=[0.5, 0.9, 2.0, 4.5, 6.0], exposed_s=0.3)
    who, undisturbed, transfer = sentences([long, other], [])
    assert "computed 2 prompts of 1,000 tokens" in who
    assert "streamed 7 tokens" in who
    assert "busy for 4.00 s" in undisturbed
    assert "received 2 pieces" in undisturbed
    assert "more than 2.50 s" in undisturbed
    assert "4.0 MB" in transfer
    assert "1.00 s in all, of which 600 ms were hidden" in transfer
    assert "waited 200 ms" in transfer


@pytest.mark.parametrize(
    ("transport", "said"),
    [
        ("cma", "into the other by UCX over cma."),
        ("shm", "into the other through shared memory (shm)."),
        ("shm-cma", "into the other by the kernel (shm-cma)."),
        ("tcp", "into the other over TCP (tcp)."),
        ("", "into the other. "),
    ],
)
def test_the_sentences_name_what_carried_the_bytes(transport: str, said: str) -> None:
    carried = record(1, sent=0.0, arrivals=[5.5, 5.6], transport=transport)
    *_, transfer = sentences([carried], [])
    assert said in transfer


def test_sizes_are_for_people() -> None:
    assert [size(n) for n in (512, 99_000, 10_400_000)] == ["0.5 kB", "99.0 kB", "10.4 MB"]


def test_the_long_prompt_is_long_and_ends_in_a_function() -> None:
    prompts = demo_prompts(lambda text: len(text) // 4)
    assert len(prompts[3].text) // 4 >= LONG_TOKENS
    assert prompts[3].text.endswith(prompts[3].shown)
    assert [prompt.by_grpc for prompt in prompts].count(True) == 1


def test_lines_carry_the_number_of_their_request() -> None:
    out = io.StringIO()
    records = [record(1, sent=0.0, arrivals=[1.0]), record(2, sent=0.0, arrivals=[1.0])]
    with Lines(Console(file=out, width=100), records) as lines:
        lines.text(0, " one\ntw")
        lines.text(1, "!")
        lines.text(0, "o")
        lines.ended(0)
        lines.ended(1)
    assert out.getvalue().splitlines()[2:] == ["  1 │ text one", "  1 │ two", "  2 │ text!"]


@pytest.mark.parametrize("height", [24, 60])
def test_panels_fit_the_terminal(height: int) -> None:
    out = io.StringIO()
    records = [record(i, sent=0.0, arrivals=[1.0]) for i in range(5)]
    for each in records:
        each.text = "".join(f"line {i}\n" for i in range(100))
    console = Console(file=out, width=100, height=height, force_terminal=True, color_system=None)
    panels = Panels(console, records)
    panels.ended(4)
    console.print(panels.get_renderable())
    drawn = out.getvalue().splitlines()
    assert len(drawn) < height
    assert max(map(len, drawn)) <= 100
    assert "line 99" in out.getvalue()
    assert out.getvalue().count(" done ") == 1


@pytest.mark.timeout(300)
def test_the_demo_runs_explains_and_leaves_nothing(baton: Start) -> None:
    demo = baton("demo")
    assert demo.end() == 0, "\n".join(demo.lines)
    said = "\n".join(demo.lines)
    assert max(map(len, demo.lines)) <= 100
    for part in ("prefill-0", "decode-0", "gateway", "The prompts' KV", "nothing is left"):
        assert part in said
    assert said.count(DECODE * 3) >= 5
    demo.assert_nothing_left()
