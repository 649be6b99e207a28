import pytest

from baton.core.ids import RequestId
from baton.core.request import FinishReason, GenerateRequest
from baton.engine.stop import finish_reason


@pytest.mark.parametrize(
    ("generated", "token", "reason"),
    [
        (1, 5, None),
        (2, 5, None),
        (3, 5, FinishReason.LENGTH),
        (4, 5, FinishReason.LENGTH),
        (1, 8, FinishReason.STOP),
        (2, 9, FinishReason.STOP),
        (3, 9, FinishReason.STOP),
    ],
)
def test_stop_tokens_come_before_length(generated: int, token: int, reason: FinishReason | None):
    request = GenerateRequest(RequestId("r"), (1, 2), max_tokens=3, stop_token_ids=(8, 9))
    assert finish_reason(request, generated, token) is reason


def test_no_stop_tokens():
    request = GenerateRequest(RequestId("r"), (1,), max_tokens=2)
    assert finish_reason(request, 1, 0) is None
