"""A sample of the campaign that `make chaos-nodes` runs in full: one cluster for all."""

from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio

from .campaign import Campaign
from .faults import KINDS, draw_schedule
from .nodes import why_not

LEFT_OUT = ("cut", "scale_up", "stop_controller", "stop_prefill")
"""Much like the others, and test_three_nodes.py has every kind."""
SAMPLE = [seed for seed, kind in enumerate(KINDS) if kind not in LEFT_OUT]

pytestmark = [
    pytest.mark.skipif(why_not() is not None, reason=str(why_not())),
    # The first one also starts three Rays and the instances.
    pytest.mark.timeout(900),
]


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def campaign(demo_model_dir: Path) -> AsyncIterator[Campaign]:
    async with Campaign(demo_model_dir) as campaign:
        yield campaign


@pytest.mark.asyncio(loop_scope="module")
@pytest.mark.parametrize("seed", SAMPLE, ids=lambda seed: f"{seed}-{KINDS[seed]}")
async def test_a_schedule_of_faults_costs_no_token_and_no_block(
    campaign: Campaign, seed: int
) -> None:
    report = await campaign.run(seed)
    story = "\n".join([*report.problems, *report.log, campaign.logs])
    assert not report.problems, f"replay with: make chaos-nodes NODE_SEEDS={seed}\n{story}"


def test_a_seed_always_draws_the_same_and_each_kind_has_its_turn() -> None:
    drawn = [draw_schedule(seed, 8) for seed in range(len(KINDS))]
    assert drawn == [draw_schedule(seed, 8) for seed in range(len(KINDS))]
    assert [schedule.faults[0].kind for schedule in drawn] == list(KINDS)
    for schedule in drawn:
        killed = any(fault.kind == "kill_gateway" for fault in schedule.faults)
        assert bool(schedule.guests) == killed
