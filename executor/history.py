"""What the sampled sequences have said so far, kept from step to step as counts per token.

Nothing here is state of its own: it is rebuilt from the plan whenever a sequence did not sample
in the step before, so that preemption, handover and retries change no token.
"""

from collections import deque
from collections.abc import Iterable, Sequence

import numpy as np
from numpy.typing import NDArray

from baton.core.ids import SeqId
from baton.executor.batch import SampledRow

_FIRST_ROOM = 64


class History:
    """The tokens of one sequence: which there are, and how often each is in the output."""

    def __init__(self, prompt_len: int) -> None:
        """It is empty; the first `prompt_len` tokens that come are the prompt."""
        self.tokens: list[int] = []
        self._prompt_len = prompt_len
        self._index: dict[int, int] = {}
        self._ids = np.zeros(_FIRST_ROOM, dtype=np.int64)
        self._counts = np.zeros(_FIRST_ROOM, dtype=np.float32)

    def __repr__(self) -> str:
        return f"<History of {len(self.tokens)} tokens, {len(self._index)} different>"

    @property
    def ids(self) -> NDArray[np.int64]:
        """Each token in prompt or output, once."""
        return self._ids[: len(self._index)]

    @property
    def counts(self) -> NDArray[np.float32]:
        """How often each of `ids` is in the output."""
        return self._counts[: len(self._index)]

    def extend(self, tokens: Sequence[int]) -> None:
        """Take the tokens that follow."""
        for position, token in enumerate(tokens, len(self.tokens)):
            index = self._index.setdefault(token, len(self._index))
            if index == len(self._ids):
                self._ids = np.resize(self._ids, 2 * index)
                self._counts = np.append(self._counts, np.zeros(index, dtype=np.float32))
            self._ids[index] = token
            if position >= self._prompt_len:
                self._counts[index] += 1
        self.tokens += tokens


class Histories:
    """The histories of the sequences of the last steps whose sampling recalls tokens."""

    def __init__(self, depth: int = 1) -> None:
        """`depth` is how many steps may be under way at once."""
        self._kept: deque[dict[SeqId, History]] = deque(maxlen=depth)

    def __len__(self) -> int:
        return sum(map(len, self._kept))

    def advance(self, rows: Iterable[SampledRow]) -> dict[SeqId, History]:
        """Take in a step; return the history of each row that recalls, up to its position."""
        histories: dict[SeqId, History] = {}
        for row in rows:
            if row.context is None or not row.sampling.recalls:
                continue
            if row.context.before is None:
                history = self._of(row.seq_id)
            else:
                history = History(row.context.prompt_len)
                history.extend(row.context.before)
            history.extend(row.tokens)
            assert len(history.tokens) == row.position, f"{history} before {row.position}"
            histories[row.seq_id] = history
        self._kept.appendleft(histories)
        return histories

    def _of(self, seq_id: SeqId) -> History:
        for histories in self._kept:
            if seq_id in histories:
                return histories[seq_id]
        raise KeyError(seq_id)
