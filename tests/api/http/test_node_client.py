"""OpenAI's own client for JavaScript; skipped where there is no node, or no registry to get it."""

import asyncio
import json
import os
import shutil
from pathlib import Path

import pytest

NODE = Path(__file__).resolve().parents[1] / "node"
INSTALL_S = 60
"""For npm; a registry that is slower is as good as none."""
OLDEST_NODE = 18
"""The first that can fetch."""
ARGUMENTS = '{"city": "K\u00f6ln \U0001f600"}'
CALL = f'Look: <tool_call>{{"name": "get_weather", "arguments": {ARGUMENTS}}}</tool_call>'


@pytest.fixture(scope="module")
def tokenizer(tool_tokenizer):
    return tool_tokenizer


async def run(*command: str, folder: Path, **variables: str) -> tuple[int, str]:
    """Run a command to its end, and kill it if it does not come to one."""
    process = await asyncio.create_subprocess_exec(
        *command,
        cwd=folder,
        env=os.environ | variables,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    try:
        async with asyncio.timeout(INSTALL_S):
            out, errors = await process.communicate()
    except TimeoutError:
        process.kill()
        await process.wait()
        return -1, f"{command[0]} took longer than {INSTALL_S} s"
    assert process.returncode is not None
    return process.returncode, (errors if process.returncode else out).decode()


async def installed(tmp_path: Path) -> Path:
    if shutil.which("node") is None or shutil.which("npm") is None:
        pytest.skip("there is no node, or no npm")
    status, version = await run("node", "--version", folder=tmp_path)
    if status or int(version.strip().removeprefix("v").partition(".")[0]) < OLDEST_NODE:
        pytest.skip(f"node {OLDEST_NODE} or later is needed, not {version.strip()}")
    for file in NODE.iterdir():
        if file.is_file():
            shutil.copy(file, tmp_path)
    flags = (
        "--ignore-scripts",
        "--no-audit",
        "--no-fund",
        "--fetch-retries=0",
        "--fetch-timeout=15000",
    )
    status, told = await run("npm", "ci", *flags, folder=tmp_path)
    if status:
        pytest.skip(f"npm cannot install the client: {told[-300:]}")
    return tmp_path


async def test_the_official_client_for_javascript(
    tmp_path, front_door, leader, text_script, tokenizer
):
    folder = await installed(tmp_path)
    leader.script = text_script(CALL, finish="stop")
    base = f"{front_door.http_url}/v1"
    status, told = await run("node", "client.mjs", folder=folder, BASE_URL=base)
    assert status == 0, told
    seen = json.loads(told)
    for message in (seen["whole"], seen["streamed"]):
        assert message["content"] == "Look:"
        [call] = message["tool_calls"]
        assert call["function"]["name"] == "get_weather"
        assert call["function"]["arguments"] == ARGUMENTS
    assert seen["finish"] == "tool_calls"
    assert seen["usage"] == seen["streamedUsage"] > len(tokenizer.encode(CALL))
    assert seen["echoed"] == f"hi {CALL}"
    assert seen["models"] == ["demo"]
    assert seen["error"] == {"kind": "BadRequestError", "status": 400, "param": "prompt"}
    assert seen["requestId"] == "mine"
