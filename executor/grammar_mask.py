"""Which tokens a grammar lets come next, together with what else forbids or ends."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

import numpy as np
from numpy.typing import NDArray

from baton.core.ids import SeqId


@dataclass(frozen=True, slots=True)
class GrammarMask:
    """What may come next in one output."""

    bits: NDArray[np.int32]
    """[words]: the tokens that the grammar allows; see models/grammar.py."""
    accepts: bool
    """Whether the output may end here."""
    eos_token_ids: tuple[int, ...]
    """The model's own ends of a text, whatever ends this request."""
    vocabulary: int

    def allowed(self, forbidden: Iterable[int], stop_token_ids: Sequence[int]) -> NDArray[np.bool_]:
        """Return whether each token [vocabulary] may come next; at least one may.

        Stop tokens may where the output may end, and nowhere else. What is `forbidden` for other
        reasons (bad words, and stop tokens while there are too few tokens) may not, unless nothing
        else is left: the grammar goes before. An output that can only end, of a request that no
        token ends, has the model's own end of a text until it is long enough.
        """
        allowed = np.unpackbits(self.bits.view(np.uint8), bitorder="little").view(np.bool_)
        allowed = allowed[: self.vocabulary]
        allowed[list(self.eos_token_ids)] = False
        text = allowed.copy()
        allowed[list(stop_token_ids)] = self.accepts
        allowed[list(forbidden)] = False
        if allowed.any():
            return allowed
        if self.accepts:
            text[:] = False
            text[list(stop_token_ids or self.eos_token_ids)] = True
        return text


NO_MASKS: Mapping[SeqId, GrammarMask] = MappingProxyType({})
"""Of steps without grammars."""
