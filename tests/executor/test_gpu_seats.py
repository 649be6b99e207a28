import pytest
import torch

from baton.core.request import SamplingParams
from baton.engine.step import ScheduledSequence
from baton.executor.gpu_seats import Seats, SeatTensors, seats_needed

BLOCKS = 4
SAMPLED = SamplingParams(
    temperature=0.7, top_k=5, top_p=0.9, min_p=0.1, typical_p=0.8, seed=2**63 - 1
)


def part(seq_id: int, *blocks: int) -> ScheduledSequence:
    return ScheduledSequence(seq_id, (1,), 0, blocks, True, SAMPLED)


class Both:
    """Host and device, kept in step."""

    def __init__(self, rows: int = 2, depth: int = 2) -> None:
        count = seats_needed(rows, depth)
        self.seats = Seats(count, BLOCKS, depth=depth)
        self.device = SeatTensors(count, BLOCKS, torch.device("cpu"))

    def step(self, *parts: ScheduledSequence) -> list[int]:
        """Tell the device of a plan; every table must be whole there."""
        changes = self.seats.take_plan(parts)
        if changes.params:
            self.device.take_params(torch.from_numpy(self.seats.params.ravel()))
        if changes.cells:
            self.device.take_cells(torch.tensor(changes.cells), torch.tensor(changes.blocks))
        self.sent = len(changes.cells)
        for seat, one in zip(changes.seats, parts, strict=True):
            found = self.device.tables[seat, : len(one.blocks)]
            assert found.tolist() == list(one.blocks)
        return changes.seats


def test_only_what_has_changed_is_sent() -> None:
    both = Both()
    first = part(7, 3, 4)
    seats = both.step(first, part(8, 5))
    assert both.sent == 3
    assert both.step(first, part(8, 5)) == seats
    assert both.sent == 0
    both.step(part(7, 3, 4, 9), part(8, 5))
    assert both.sent == 1
    both.step(part(7, 2, 4, 9))  # a block was exchanged
    assert both.sent == 3


def test_a_seat_is_kept_while_a_plan_may_ask_for_its_token() -> None:
    both = Both(depth=2)
    (seat,) = both.step(part(1, 3))
    both.step(part(2, 4))
    assert both.step(part(1, 3)) == [seat]
    assert both.sent == 0
    for number in range(3, 6):
        both.step(part(number, 6))
    both.step(part(1, 3))
    assert both.sent == 1, "the seat was given away meanwhile"


def test_there_are_seats_enough_for_any_plans() -> None:
    both = Both(rows=2, depth=2)
    for number in range(0, 40, 2):
        assert len(set(both.step(part(number, 1), part(number + 1, 2)))) == 2


def test_sampling_reaches_the_device_as_kernels_take_it() -> None:
    both = Both()
    (seat,) = both.step(part(1, 3))
    found = both.device.sampling(torch.tensor([seat]), torch.tensor([7]))
    assert found.temperature.tolist() == pytest.approx([0.7])
    assert found.temperature.dtype == found.top_p.dtype == found.min_p.dtype == torch.float32
    assert (found.top_k.tolist(), found.top_k.dtype) == ([5], torch.int32)
    assert found.top_p.tolist() == pytest.approx([0.9])
    assert found.min_p.tolist() == pytest.approx([0.1])
    assert found.seeds.tolist() == [2**63 - 1]
    assert found.positions.tolist() == [7]
    assert found.typical_p is not None
    assert found.typical_p.tolist() == pytest.approx([0.8])


def test_the_last_token_stands_in_for_one_that_is_not_known() -> None:
    both = Both()
    seats = torch.tensor(both.step(part(1, 3), part(2, 4)))
    both.device.take_tokens(seats, torch.tensor([50, 60]))
    assert both.device.known(torch.tensor([-1, 9]), seats).tolist() == [50, 9]
