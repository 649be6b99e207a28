"""What sequences ask of their sampling beyond cuts, on the device: penalties, changes, the past.

    history   how often each token was said        by sequences that penalise; one row each
    recent    the last few tokens                  by seat
    changes   seat, token, amount, until, after    of all sequences, in one list of fixed length

Shapes never change and nothing is read on the host, so that captured steps use all of it. The
host's side is gpu_options.py.
"""

import torch
from torch import Tensor

from baton.executor.device_sampler import RowChanges, RowPenalties, begin_history_, change_rows_

HISTORIES = 128
"""Sequences that penalise at a time; each takes four bytes a token of the vocabulary."""
CHANGES = 2048
"""Biases, stop tokens under `min_tokens` and bad words of all sequences at a time."""
WORD = 4
"""Tokens of a bad word before its last one."""
TOP = 20
"""Likeliest tokens whose logprobs are told."""

PARAMS = 4  # history, and the bits of three penalties as float64
FIELDS = 4 + WORD  # seat, token, the bits of the amount as float64, until, after …


class OptionTensors:
    """The device's side; only launched work reads and writes it."""

    def __init__(self, seats: int, vocabulary: int, device: torch.device) -> None:
        self._histories = min(seats, HISTORIES)
        # The last row is of those without penalties: it is written and never read.
        shape = (self._histories + 1, vocabulary)
        self._seen = torch.zeros(shape, dtype=torch.int32, device=device)
        self._recent = torch.full((seats + 1, WORD), -1, dtype=torch.int32, device=device)
        self._params = torch.zeros(PARAMS, seats + 1, dtype=torch.int64, device=device)
        self._params[0] = -1
        self._changes = torch.zeros(FIELDS, CHANGES, dtype=torch.int64, device=device)
        self._changes[0] = seats

    def __repr__(self) -> str:
        return f"<OptionTensors: {self._histories} histories, {CHANGES} changes>"

    @property
    def num_bytes(self) -> int:
        """What they take of the device's memory."""
        tensors = (self._seen, self._recent, self._params, self._changes)
        return sum(t.numel() * t.itemsize for t in tensors)

    def take_table(self, table: Tensor) -> None:
        """Take the host's `OptionSeats.table`, flat."""
        params = self._params.numel()
        self._params.copy_(table[:params].view_as(self._params))
        self._changes.copy_(table[params:].view_as(self._changes))

    def begin(self, seat: int, history: int, tokens: Tensor, prompt_len: int) -> None:
        """Begin the past of a sequence that has said tokens [n], of which some are its prompt's.

        `history` is -1 for a sequence without penalties.
        """
        last = tokens[-WORD:]
        self._recent[seat] = -1
        self._recent[seat, WORD - last.shape[0] :] = last.to(torch.int32)
        if history >= 0:
            begin_history_(self._seen[history], tokens[:prompt_len], tokens[prompt_len:])

    def change_(self, logits: Tensor, seats: Tensor, positions: Tensor) -> None:
        """Change float32 logits [rows, vocabulary] of the tokens at `positions` [rows]."""
        count = seats.shape[0]
        rows = torch.full((self._params.shape[1],), -1, dtype=torch.int64, device=logits.device)
        # Changes that are not used are nobody's, and so change rows that are padding.
        rows.index_copy_(0, seats, torch.arange(count, device=logits.device))
        owners, tokens, amounts, until, *after = self._changes
        changes = RowChanges(
            rows=rows[owners].to(torch.int32),
            tokens=tokens.to(torch.int32),
            amounts=amounts.view(torch.float64).float(),
            until=until,
            after=torch.stack(after, dim=1).to(torch.int32),
            recent=self._recent[seats],
        )
        change_rows_(logits, changes, positions)

    def penalties(self, seats: Tensor) -> RowPenalties:
        """Return what rows [n] are penalised for, and how much."""
        history, *floats = self._params[:, seats]
        repetition, frequency, presence = (bits.view(torch.float64).float() for bits in floats)
        return RowPenalties(self._seen, history.to(torch.int32), repetition, frequency, presence)

    def take_tokens(self, seats: Tensor, tokens: Tensor) -> None:
        """Let these be the last tokens of seats [n]; the sampler has counted them already."""
        recent = torch.cat([self._recent[seats, 1:], tokens[:, None].to(torch.int32)], dim=1)
        self._recent.index_copy_(0, seats, recent)
