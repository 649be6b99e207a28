"""The late queue finds out who does not wait, and the buffers that steps are sent by do."""

from collections.abc import Iterator

import pytest
import torch

from baton.executor.gpu_buffers import StepBuffers
from baton.executor.late_queue import LIMIT, LateQueue


@pytest.fixture
def queue() -> Iterator[LateQueue]:
    queue = LateQueue()
    yield queue
    queue.close()


def test_work_is_done_when_somebody_waits_and_no_further(queue: LateQueue) -> None:
    done: list[int] = []
    queue.launch(lambda: done.append(1))
    mark = queue.record()
    queue.launch(lambda: done.append(2))
    assert done == []
    mark.wait()
    assert done == [1]
    queue.record().wait()
    mark.wait()
    assert done == [1, 2]


def test_captured_work_is_done_with_each_replay(queue: LateQueue) -> None:
    numbers: list[int] = []
    replay = queue.capture(lambda: numbers.append(1))
    assert len(numbers) == 1
    replay()
    replay()
    assert len(numbers) == 1
    queue.record().wait()
    assert len(numbers) == 3
    assert queue.replays == 2


def test_it_does_not_fall_behind_without_end(queue: LateQueue) -> None:
    done: list[int] = []
    for number in range(3 * LIMIT):
        queue.launch(lambda number=number: done.append(number))
    assert len(done) >= LIMIT
    assert done == list(range(len(done)))


def test_what_work_raises_is_raised_where_it_is_waited_for(queue: LateQueue) -> None:
    def fail() -> None:
        raise ZeroDivisionError

    queue.launch(fail)
    with pytest.raises(ZeroDivisionError):
        queue.record().wait()


def test_what_reads_an_input_too_late_finds_another(queue: LateQueue) -> None:
    memory, found = queue.host_buffer(1), []
    memory[0] = 1
    queue.launch(lambda: found.append(int(memory[0])))
    memory[0] = 2
    queue.record().wait()
    assert found == [2]


@pytest.mark.parametrize("turns", [1, 2, 3])
def test_steps_are_sent_as_they_were_written(queue: LateQueue, turns: int) -> None:
    buffers, found = StepBuffers(queue, fixed=2, room=4, turns=turns), list[list[int]]()
    for step in range(8):
        buffers.begin()[:] = [step, -step]
        views = [buffers.put([10 * step]), buffers.put([step, step])]
        buffers.send()
        everything = [buffers.device[:2], *views]
        queue.launch(lambda parts=everything: found.append(torch.cat(parts).tolist()))
    queue.record().wait()
    assert found == [[step, -step, 10 * step, step, step] for step in range(8)]


def test_more_than_there_is_room_for_arrives_too(queue: LateQueue) -> None:
    buffers = StepBuffers(queue, fixed=1, room=3, turns=2)
    buffers.begin()
    views = [buffers.put(range(2)), buffers.put(range(5)), buffers.put([7])]
    buffers.send()
    queue.record().wait()
    assert [view.tolist() for view in views] == [[0, 1], [0, 1, 2, 3, 4], [7]]
