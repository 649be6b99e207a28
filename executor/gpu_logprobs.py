"""Logprobs that a device found, on their way to who asked for them."""

from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

from baton.core.ids import SeqId
from baton.core.request import TokenLogprobs
from baton.engine.step import ScheduledSequence
from baton.executor.gpu_option_tensors import TOP


def told_logprobs(
    found: NDArray[np.int64], rows: Iterable[tuple[int, ScheduledSequence]]
) -> dict[SeqId, TokenLogprobs]:
    """Return what the sequences of rows asked for; `found` is GpuModel.found in host memory."""
    asking = [(row, s) for row, s in rows if s.sampling.logprobs is not None]
    if not asking:
        return {}
    columns = found[:, [row for row, _ in asking]]
    own = columns[2].view(np.float64).tolist()
    ids = columns[3 : 3 + TOP].T.tolist()
    values = columns[3 + TOP :].view(np.float64).T.tolist()
    told = {}
    for (_, s), logprob, likeliest, theirs in zip(asking, own, ids, values, strict=True):
        top = tuple(zip(likeliest, theirs, strict=True))[: s.sampling.logprobs]
        told[s.seq_id] = TokenLogprobs(logprob, top)
    return told
