"""Stubs of another language, by gRPC's own library; skipped where node or a registry is missing."""

import asyncio
import json
import os
import shutil
from pathlib import Path

import grpc
import pytest

from baton.proto import inference_pb2

NODE = Path(__file__).resolve().with_name("node")
PROTO = Path(inference_pb2.__file__).with_name("inference.proto")
INSTALL_S = 120
"""For npm; a registry that is slower is as good as none."""
OLDEST_NODE = 18
TEXT = "añ😀 b"


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


async def installed(folder: Path) -> None:
    if shutil.which("node") is None or shutil.which("npm") is None:
        pytest.skip("there is no node, or no npm")
    status, version = await run("node", "--version", folder=folder)
    if status or int(version.strip().removeprefix("v").partition(".")[0]) < OLDEST_NODE:
        pytest.skip(f"node {OLDEST_NODE} or later is needed, not {version.strip()}")
    for file in NODE.iterdir():
        if file.is_file():
            shutil.copy(file, folder)
    quiet = ("--ignore-scripts", "--no-audit", "--no-fund")
    fetch = ("--fetch-retries=0", "--fetch-timeout=15000")
    status, told = await run("npm", "ci", *quiet, *fetch, folder=folder)
    if status:
        pytest.skip(f"npm cannot install gRPC: {told[-300:]}")


async def test_the_api_by_the_stubs_of_javascript(tmp_path, front_door, leader, text_script):
    await installed(tmp_path)
    leader.script = text_script(TEXT)
    status, told = await run(
        "node", "client.mjs", folder=tmp_path, ADDRESS=front_door.grpc_address, PROTO=str(PROTO)
    )
    assert status == 0, told
    seen = json.loads(told)
    assert seen["models"] == [{"id": "demo", "max_model_len": 256, "root": "demo"}]
    assert seen["one"]["text"] == seen["chat"]["text"] == TEXT
    assert seen["one"]["finish"] == "length"
    assert seen["one"]["tokens"] > 0
    assert seen["back"] == "añ😀"
    assert seen["batch"]["texts"] == {"a": TEXT, "b": TEXT, "c": TEXT, "bad": "invalid_request"}
    assert seen["batch"]["opened"] > 0
    assert seen["refused"]["code"] == grpc.StatusCode.INVALID_ARGUMENT.value[0]
    assert seen["refused"]["details"].startswith("invalid_request: top_p: ")
    assert seen["cancelled"] == 0
