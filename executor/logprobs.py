"""Logprobs of sampled tokens and their rivals, from the model's logits as they are."""

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from baton.core.ids import SeqId
from baton.core.request import TokenLogprobs
from baton.executor.batch import SampledRow


class RawLogprobs:
    """Taken before the logits are changed; told once the tokens are known."""

    def __init__(
        self,
        logits: Tensor,
        rows: Mapping[int, SampledRow],
        whole: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        """`logits` are float32 [rows, vocabulary]; `rows` has by its index every row that may ask.

        It keeps a copy of the rows that do. If `logits` are of some tokens only, `whole` makes rows
        of all tokens of them.
        """
        self._rows = [(i, row) for i, row in rows.items() if row.sampling.logprobs is not None]
        self._logprobs: Tensor | None = None
        if self._rows:
            index = torch.tensor([i for i, _ in self._rows], device=logits.device)
            found = logits[index] if whole is None else whole(logits[index])
            self._logprobs = torch.log_softmax(found, dim=-1)

    def told(self, tokens: Sequence[int]) -> dict[SeqId, TokenLogprobs]:
        """Return what each row asked for, given the token sampled in every row of the batch."""
        if self._logprobs is None:
            return {}
        device, vocabulary = self._logprobs.device, self._logprobs.shape[1]
        sampled = torch.tensor([tokens[i] for i, _ in self._rows], device=device)
        own = self._logprobs.gather(1, sampled[:, None])[:, 0].tolist()
        widest = max(row.sampling.logprobs or 0 for _, row in self._rows)
        top = self._logprobs.topk(min(widest, vocabulary), dim=-1)
        likeliest = zip(top.indices.tolist(), top.values.tolist(), strict=True)
        return {
            row.seq_id: TokenLogprobs(
                logprob, tuple(zip(ids, values, strict=True))[: row.sampling.logprobs]
            )
            for (_, row), logprob, (ids, values) in zip(self._rows, own, likeliest, strict=True)
        }
