import json

import pytest

from baton.core.trace import HandoverTrace, RequestTrace


@pytest.mark.parametrize(
    ("transfer", "exposed", "share"),
    [(2.0, 0.5, 0.75), (2.0, 2.0, 0.0), (2.0, 0.0, 1.0), (0, 0, 0)],
)
def test_overlap_is_the_share_that_compute_hides(transfer: float, exposed: float, share: float):
    assert HandoverTrace("p", 0, "ok", transfer_s=transfer, exposed_s=exposed).overlapped == share


def test_a_trace_is_ready_for_json():
    handovers = tuple(
        HandoverTrace("p", i, "ok", transfer_s=4.0, exposed_s=float(i)) for i in range(2)
    )
    trace = RequestTrace("r", "d", 3, 2, "stop", handovers=handovers, itl_s=(0.1,))
    data = json.loads(json.dumps(trace.as_dict()))
    assert [row["overlapped"] for row in data["handovers"]] == [1.0, 0.75]
    assert (data["request_id"], data["finish"], data["itl_s"]) == ("r", "stop", [0.1])
