"""deploy/ray: Ray accepts the launcher's files, Baton its spec; the Slurm script ends in order."""

import contextlib
import os
import re
import shlex
import shutil
import signal
import stat
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from ray.autoscaler._private.util import prepare_config, validate_config

from baton.cluster.placement import cpus_of
from baton.cluster.spec import load_spec

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # it also reads Ray Serve, which uses pydantic's old ways
    from ray.scripts.scripts import cli as ray_cli

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "deploy" / "ray"
LAUNCHED = ("onprem", "aws")
DEADLINE_S = 120


def launcher(name: str) -> dict[str, Any]:
    config: dict[str, Any] = yaml.safe_load((FOLDER / f"{name}.yaml").read_text())
    return config


def starts(config: dict[str, Any]) -> list[list[str]]:
    """Return the arguments of each `ray start` in a launcher's file, head first."""
    lines = config["head_start_ray_commands"] + config["worker_start_ray_commands"]
    return [line.split("ray start ")[1].split() for line in lines if "ray start " in line]


@pytest.mark.parametrize("name", LAUNCHED)
def test_ray_accepts_the_file(name: str) -> None:
    config = prepare_config(launcher(name))
    validate_config(config)
    assert config["available_node_types"]


@pytest.mark.parametrize("name", LAUNCHED)
def test_ray_would_refuse_a_field_that_it_does_not_know(name: str) -> None:
    with pytest.raises(Exception, match="no_such_field"):
        validate_config(prepare_config({**launcher(name), "no_such_field": 1}))


@pytest.mark.parametrize("name", LAUNCHED)
def test_every_ray_start_is_a_command_line_of_ray(name: str) -> None:
    found = starts(launcher(name))
    assert len(found) == 2
    for arguments in found:
        given = [a.replace("$RAY_HEAD_IP", "192.0.2.1") for a in arguments]
        params = ray_cli.commands["start"].make_context("start", given).params
        assert params["object_store_memory"] == 200_000_000
        assert params["head"] or params["address"] == "192.0.2.1:6379"
    assert [("--head" in arguments) for arguments in found] == [True, False]


@pytest.mark.parametrize("name", LAUNCHED)
def test_every_node_asks_for_the_cluster_s_token(name: str) -> None:
    config = launcher(name)
    assert "~/.ray/auth_token" in config["file_mounts"]
    lines = config["head_start_ray_commands"] + config["worker_start_ray_commands"]
    by_image = "--env=RAY_AUTH_MODE=token" in config.get("docker", {}).get("run_options", [])
    for line in lines:
        assert "ray start" not in line or by_image or "RAY_AUTH_MODE=token" in line


def pages_commands() -> list[list[str]]:
    """Return the words of each `ray …` in the console blocks of docs/ray.md."""
    text = (ROOT / "docs" / "ray.md").read_text()
    blocks = "".join(re.findall(r"```console\n(.*?)```", text, re.DOTALL))
    found = (shlex.split(line, comments=True) for line in re.findall(r"^\$ (.*)$", blocks, re.M))
    return [words[1:] for words in found if words[0] == "ray"]


def test_every_command_of_the_page_is_one_of_ray() -> None:
    found = pages_commands()
    assert {words[0] for words in found} == {"get-auth-token", "up", "exec", "down", "job"}
    assert ["job", "submit", "--"] in [words[:3] for words in found]
    for words in found:
        group: Any = ray_cli
        while hasattr(group, "commands"):
            name, *words = words
            group = group.commands[name]
        group.make_context(name, list(words))  # raises for what it does not know


def test_pools_find_nodes_with_the_resources_that_they_may_ask_for() -> None:
    types = launcher("aws")["available_node_types"]
    assert types["prefill"]["resources"]["prefill"] == types["prefill"]["resources"]["GPU"]
    assert types["decode"]["resources"]["decode"] == types["decode"]["resources"]["GPU"]


def test_the_spec_is_one_of_baton_with_the_model_where_the_image_has_it() -> None:
    spec = load_spec(FOLDER / "baton.yaml")
    assert set(spec.pools()) == {"prefill", "decode"}
    assert cpus_of(spec) <= 8
    installed = re.search(
        r"/opt/baton/lib/python3\.\d+/site-packages/baton/(.+)", str(spec.models[0].dir)
    )
    assert installed is not None
    assert (ROOT / installed[1] / "config.json").is_file()


def program(folder: Path, name: str, text: str) -> None:
    path = folder / name
    path.write_text("#!/bin/bash\n" + text)
    path.chmod(path.stat().st_mode | stat.S_IXUSR)


@pytest.fixture
def slurm(tmp_path: Path) -> dict[str, str]:
    """Stand-ins for Slurm, Ray and Baton that write down how they are called."""
    folder = tmp_path / "bin"
    folder.mkdir()
    note = f'echo "$(basename "$0") $*" >>{tmp_path}/calls\n'
    program(folder, "scontrol", 'printf "n1\\nn2\\nn3\\n"\n')
    skip = "while [[ $1 == --* ]]; do [[ $1 == --nodelist=* ]] && node=${1#*=}; shift; done\n"
    address = '[[ $* == "hostname --all-ip-addresses" ]] && { echo "10.0.0.1 10.9.9.9 "; exit; }\n'
    program(folder, "srun", f'{skip}{address}echo "on $node" >>{tmp_path}/calls\nexec "$@"\n')
    block = "[[ $1 == start ]] && exec sleep 600\nexit 0\n"
    program(folder, "ray", note + block)
    fails = f"[[ $1 == up && -e {tmp_path}/refuse ]] && exit 3\nexit 0\n"
    program(folder, "baton", note + fails)
    # Waits for the nodes, as the program that it stands for does.
    started = f"$(grep -c '^ray start' {tmp_path}/calls)"
    wait = f"until [[ {started} == 3 ]]; do sleep 0.05; done\n"
    program(folder, "python", f'[[ $1 == -c ]] && exec {sys.executable} "$@"\n' + wait)
    return {
        "PATH": f"{folder}:{os.environ['PATH']}",
        "BATON_BIN": str(folder),
        "SLURM_JOB_ID": "7",
        "SLURM_JOB_NODELIST": "n[1-3]",
        "SLURM_TMPDIR": str(tmp_path),
        "HOME": str(tmp_path),
    }


@contextlib.contextmanager
def slurm_job(environment: dict[str, str]) -> Iterator["subprocess.Popen[str]"]:
    command = ["bash", str(FOLDER / "slurm.sbatch"), str(FOLDER / "baton.yaml")]
    job = subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    with job:
        try:
            yield job
        finally:
            job.terminate()  # does nothing if it has ended


def test_slurm_starts_ray_on_each_node_and_ends_in_order(
    slurm: dict[str, str], tmp_path: Path
) -> None:
    with slurm_job(slurm) as job:
        assert job.stdout is not None
        assert "serving" in job.stdout.readline()
        job.send_signal(signal.SIGTERM)  # as Slurm does before the time is over
        job.communicate(timeout=DEADLINE_S)
        assert job.returncode == 0
    calls = (tmp_path / "calls").read_text().splitlines()
    assert {"on n1", "on n2", "on n3"} <= set(calls)
    started = [call for call in calls if call.startswith("ray start")]
    assert ["--head" in call for call in started].count(True) == 1
    assert sum("--address=10.0.0.1:6379" in call for call in started) == 2
    assert f"baton up --file {FOLDER / 'baton.yaml'} --address 10.0.0.1:6379" in calls
    assert calls[-1] == "baton down --address 10.0.0.1:6379"
    assert not list(tmp_path.glob("baton-7-*")), "its state is left"


def test_slurm_s_job_fails_if_baton_refuses_the_spec(slurm: dict[str, str], tmp_path: Path) -> None:
    (tmp_path / "refuse").touch()
    with slurm_job(slurm) as job:
        job.communicate(timeout=DEADLINE_S)
        assert job.returncode == 3
    assert (tmp_path / "calls").read_text().splitlines()[-1].startswith("baton down")


def test_slurm_s_script_asks_for_what_it_needs(tmp_path: Path) -> None:
    done = subprocess.run(
        [str(shutil.which("bash")), str(FOLDER / "slurm.sbatch")],
        env={"PATH": os.environ["PATH"], "HOME": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=DEADLINE_S,
        check=False,
    )
    assert done.returncode != 0
    assert "the spec of a cluster" in done.stderr
