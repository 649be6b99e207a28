import asyncio
import json
import sys
from pathlib import Path

import pytest

LOAD = Path(__file__).resolve().parents[2] / "bench" / "load.py"


async def load(front_door, tmp_path, *options: str) -> tuple[dict, str]:
    figures = tmp_path / "figures.json"
    command = [str(LOAD), "--url", front_door.http_url, "--json", str(figures)]
    limits = ["--input-max", "60", "--output-max", "20", "--warmup", "1"]
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        *command,
        *limits,
        *options,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
    )
    output, _ = await asyncio.wait_for(process.communicate(), 60)
    assert process.returncode == 0, output.decode()
    return json.loads(figures.read_text()), output.decode()


@pytest.mark.parametrize("how", [("--rate", "50"), ("--concurrency", "3")])
async def test_it_measures_what_the_server_did(front_door, leader, text_script, tmp_path, how):
    leader.script = text_script("word " * 40)
    figures, output = await load(front_door, tmp_path, "--requests", "12", *how)
    assert figures["succeeded"] == figures["requests"] == 12
    assert figures["errors"] == {}
    counted = [submit.request for submit in leader.submits[1:]]
    tokens_out = sum(request.max_tokens for request in counted)
    tokens_in = sum(len(request.prompt) for request in counted)
    assert figures["output_tokens_per_s"] * figures["seconds"] == pytest.approx(tokens_out)
    assert figures["input_tokens_per_s"] * figures["seconds"] == pytest.approx(tokens_in)
    assert len({tuple(request.prompt) for request in counted}) == 12
    assert 0 < figures["ttft_ms"]["p50"] <= figures["ttft_ms"]["p99"]
    assert "12 of 12" in output


async def test_refusals_are_counted_by_code(make_front_door, leader, text_script, tmp_path):
    leader.script = text_script("word " * 40)
    door = await make_front_door(max_open_requests=1, max_queued_requests=0)
    figures, output = await load(door, tmp_path, "--requests", "20", "--rate", "100000")
    assert figures["errors"]["overloaded"] >= 1
    assert figures["succeeded"] + figures["errors"]["overloaded"] == 20
    assert "x overloaded" in output
