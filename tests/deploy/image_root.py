"""Runs the steps of deploy/docker/Dockerfile in plain folders, where there is no container engine.

    python -m tests.deploy.image_root BASE WORK --target cpu [--bind /opt/wheels]

BASE is a Debian root as `debootstrap --variant=minbase bookworm BASE` makes it, which is what the
image debian:bookworm-slim is but for some documentation; each stage becomes a folder of WORK. Needs
root, for chroot; mounts are made in a mount namespace of its own and end with it.
"""

import argparse
import os
import re
import shlex
import shutil
import subprocess
from pathlib import Path

from tests.deploy.dockerfile import Stage, copied, ignored, parse

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "deploy" / "docker"
_MOUNTS = (
    "mount -t proc proc {0}/proc && mount -t tmpfs tmpfs {0}/dev/shm && mount --bind /sys {0}/sys"
)


def build(base: Path, work: Path, target: str, binds: list[Path], hosts: dict[str, str]) -> Path:
    """Run all that `target` needs, and return the folder that is then what the image has."""
    stages = {stage.name: stage for stage in parse((FOLDER / "Dockerfile").read_text())}
    built: dict[str, Path] = {}

    def ready(name: str) -> Path:
        if name in built:
            return built[name]
        stage = stages[name]
        below = ready(stage.base) if stage.base in stages else base
        for needed in stage.copies_from():
            ready(needed)
        folder = work / name
        print(f"== {name}, on {below}", flush=True)  # noqa: T201
        subprocess.run(["cp", "-a", "--reflink=auto", str(below), str(folder)], check=True)
        for bind in binds:
            (folder / bind.relative_to("/")).mkdir(parents=True, exist_ok=True)
        _run_stage(stage, folder, built, stages, binds, hosts)
        built[name] = folder
        return folder

    return ready(target)


def _run_stage(
    stage: Stage,
    folder: Path,
    built: dict[str, Path],
    stages: dict[str, Stage],
    binds: list[Path],
    hosts: dict[str, str],
) -> None:
    environment = {**stage.inherited_environment(stages), **hosts}
    for instruction, value in stage.steps:
        print(f"-- {instruction} {value[:100]}", flush=True)  # noqa: T201
        if instruction == "RUN":
            enter(folder, ["/bin/sh", "-eu", "-c", value], environment, binds)
        elif instruction == "COPY":
            _copy(value, folder, built)
        elif instruction == "WORKDIR":
            (folder / value.lstrip("/")).mkdir(parents=True, exist_ok=True)


def enter(
    folder: Path, command: list[str], environment: dict[str, str], binds: list[Path], user: int = 0
) -> None:
    """Run a command in a root, with /proc and /dev/shm, and `binds` to be read there."""
    mounts = [_MOUNTS.format(shlex.quote(str(folder)))]
    for bind in binds:
        there = shlex.quote(f"{folder}{bind}")
        mounts.append(f"mount --bind -o ro {shlex.quote(str(bind))} {there}")
    chroot = ["chroot", f"--userspec={user}:{user}", str(folder), *command]
    script = " && ".join([*mounts, f"exec {shlex.join(chroot)}"])
    unshare = ["unshare", "--mount", "--pid", "--fork", "--kill-child", "--propagation=private"]
    subprocess.run([*unshare, "/bin/sh", "-c", script], check=True, env=environment)


def _copy(value: str, folder: Path, built: dict[str, Path]) -> None:
    stage, sources, target = copied(value)
    into = folder / target.lstrip("/")
    if stage:
        for source in sources:
            subprocess.run(["cp", "-a", f"{built[stage]}{source}", str(into)], check=True)
        return
    patterns = (FOLDER / "Dockerfile.dockerignore").read_text()
    into.mkdir(parents=True, exist_ok=True)
    for source in sources:
        if source != ".":
            shutil.copy(ROOT / source, into)
            continue
        files = subprocess.run(
            ["git", "-C", str(ROOT), "ls-files"], check=True, capture_output=True, text=True
        )
        for name in files.stdout.splitlines():
            if not ignored(name, patterns):
                (into / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(ROOT / name, into / name, follow_symlinks=False)


def main() -> None:
    """Build one target."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("base", type=Path)
    parser.add_argument("work", type=Path)
    parser.add_argument("--target", required=True)
    parser.add_argument("--bind", type=Path, action="append", default=[], help="to be read inside")
    args = parser.parse_args()
    args.work.mkdir()
    passed = {k: v for k, v in os.environ.items() if re.match(r"PIP_|TORCH_CPU_INDEX|\w+_proxy", k)}
    print(build(args.base.resolve(), args.work.resolve(), args.target, args.bind, passed))  # noqa: T201


if __name__ == "__main__":
    main()
