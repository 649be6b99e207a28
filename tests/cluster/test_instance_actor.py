"""The inside of an instance's process, without Ray; it redirects output, so not in this process."""

import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent

SCRIPT = """
import sys, threading
from pathlib import Path
from baton.cluster.instance_actor import InstanceActor
from baton.core.config import WorkerConfig
from baton.core.errors import BatonError

log, worker, out = Path(sys.argv[1]), sys.argv[2], Path(sys.argv[3])
actor = InstanceActor(log)
config = WorkerConfig(instance_id="decode-0", role="decode", model_dir=Path("x"), model_name="m")
said = []
def follow():
    while lines := actor.progress(len(said)):
        said.extend(lines)
follower = threading.Thread(target=follow)
follower.start()
closed = threading.Thread(target=lambda: said_closed.append(actor.wait_closed(600.0)))
said_closed = []
closed.start()
assert not actor.begun()
assert not actor.wait_closed(0.0), "a question has an end"
try:
    info = actor.start(f"stand_in_worker:{worker}", config)
    result = f"started {info.instance_id} {sorted(actor.stats())}"
except BatonError as error:
    result = f"{type(error).__name__}: {error}"
assert actor.begun()
follower.join(10)
assert not follower.is_alive()
assert closed.is_alive()
actor.close()
closed.join(10)
assert said_closed == [True]
out.write_text("\\n".join([result, *said]))
"""


def host(worker: str, folder: Path) -> tuple[list[str], str]:
    """Run one worker from start to close; return (result and progress lines, log)."""
    log, out = folder / "log", folder / "out"
    command = [sys.executable, "-c", SCRIPT, str(log), worker, str(out)]
    subprocess.run(
        command, check=True, timeout=60, env={"PYTHONPATH": str(HERE), "OMP_NUM_THREADS": "1"}
    )
    return out.read_text().split("\n"), log.read_text()


def test_a_worker_is_started_followed_asked_and_closed(tmp_path: Path) -> None:
    (result, *said), log = host("StandIn", tmp_path)
    assert result == "started decode-0 ['omp', 'pid']"
    assert said[-1] == "standing in"
    assert log.endswith("closed in order\n")


def test_an_error_of_ours_keeps_its_type_and_words(tmp_path: Path) -> None:
    (result, *_), _ = host("Refusing", tmp_path)
    assert result == "InvalidConfig: kv_memory_mib: 7 is not allowed; allowed: 8 or more"


def test_a_foreign_error_is_named_and_its_trace_is_logged(tmp_path: Path) -> None:
    (result, *_), log = host("Failing", tmp_path)
    assert result == "InternalError: ValueError: no luck"
    assert "Traceback" in log
    assert 'raise ValueError("no luck")' in log


def test_a_worker_class_that_is_not_there_is_an_error(tmp_path: Path) -> None:
    (result, *said), _ = host("Absent", tmp_path)
    assert result.startswith("InternalError: AttributeError")
    assert said == ["importing the model's libraries"]
