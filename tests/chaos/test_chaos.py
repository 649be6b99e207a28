"""A sample of the campaign that `make chaos` runs in full."""

import pytest

from .campaign import Campaign
from .schedule import draw_schedule

SAMPLE = range(180, 210)
"""Three worlds, and every kind of fault by turns."""


@pytest.mark.asyncio(loop_scope="module")
@pytest.mark.parametrize("seed", SAMPLE)
async def test_a_schedule_of_faults_costs_no_token_and_no_block(
    campaign: Campaign, seed: int
) -> None:
    schedule, report = await campaign.run(seed)
    story = "\n".join([*report.problems, str(schedule), *report.log])
    assert not report.problems, f"replay with: make chaos SEEDS={seed}\n{story}"


def test_a_seed_always_draws_the_same() -> None:
    drawn = [draw_schedule(seed) for seed in range(40)]
    assert drawn == [draw_schedule(seed) for seed in range(40)]
    assert len({str(schedule) for schedule in drawn}) == 40
