"""One campaign for all tests of the folder, so that they share processes."""

import sys
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio

# The workers' processes import this folder by its full name.
sys.path.append(str(Path(__file__).parents[2]))

from .campaign import Campaign


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def campaign(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Campaign]:
    """Runs seeds; at the end every process closes in good order."""
    campaign = Campaign(tmp_path_factory.mktemp("chaos"))
    yield campaign
    await campaign.close()
