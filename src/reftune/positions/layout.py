"""Where each token of a batch stands: in which prompt, at which place in it, or how far into the answer.

Everything is a tensor over (row, column), so that left padding, right padding, packing and a cache that holds the
first columns already are one case, not four. Columns are *absolute*: those in the cache come first.
"""

from dataclasses import dataclass, fields

import torch
from torch import Tensor


@dataclass(frozen=True)
class Layout:
    """Places of the tokens, all (B, T) and int64; a batch of B rows and T columns.

    index: place in its prompt, 0-based, −1 outside prompts.     length: tokens of its prompt (0 on padding).
    generated: place in its answer, 0-based, −1 outside answers.  segment: number of its prompt, unique in the batch.
    """

    index: Tensor
    length: Tensor
    generated: Tensor
    segment: Tensor

    @property
    def shape(self) -> torch.Size:
        return self.index.shape

    def last(self, columns: int) -> "Layout":
        """The layout of the last columns only: the tokens that this forward pass computes."""
        return Layout(*(getattr(self, field.name)[:, self.shape[1] - columns :] for field in fields(self)))


def layout(real: Tensor, response: Tensor | None = None, starts: Tensor | None = None) -> Layout:
    """The layout of a batch.

    Args:
        real: (B, T) bool, False on padding.
        response: (B, T) bool, True where an answer starts or goes on: from its first True to the end of its segment
            a token is no longer prompt. None: everything is prompt.
        starts: (B, T) bool, True on the first token of every packed sequence. None: one sequence a row.
    """
    batch, columns = real.shape
    segment = torch.arange(batch, device=real.device).unsqueeze(1).expand(batch, columns)
    if starts is not None:
        # numbered over the whole batch; a row never shares a number with the next one
        segment = (starts.long().cumsum(1) + segment * (columns + 1)).contiguous()
        segment = torch.unique(segment, return_inverse=True)[1]
    count = int(segment.max()) + 1 if starts is not None and segment.numel() else batch

    answer = torch.zeros_like(real) if response is None else _rank(response & real, segment, count) >= 0
    prompt = real & ~answer
    index = torch.where(prompt, _rank(prompt, segment, count), -1)
    generated = torch.where(real & answer, _rank(real & answer, segment, count), -1)
    length = torch.zeros(count, dtype=torch.long, device=real.device)
    length = length.index_add(0, segment.reshape(-1), prompt.reshape(-1).long())[segment]
    return Layout(index, torch.where(real, length, 0), generated, segment)


def generated(rows: int, places: Tensor) -> Layout:
    """The layout (rows, T) of generated tokens alone, `places` (T,) in their answers; `length`, which they have no use
    for, is 0."""
    places = places.expand(rows, -1)
    segment = torch.arange(rows, device=places.device).unsqueeze(1).expand(places.shape)
    return Layout(torch.full_like(places, -1), torch.zeros_like(places), places, segment)


def _rank(flag: Tensor, segment: Tensor, count: int) -> Tensor:
    """How many flags came before within the segment, counting this one, minus one: (B, T) → (B, T)."""
    running = flag.long().cumsum(1)
    before = running - flag.long()
    # what the row had counted when the segment began is the smallest `before` in the segment
    floor = torch.full((count,), torch.iinfo(torch.long).max, device=flag.device)
    floor = floor.scatter_reduce(0, segment.reshape(-1), before.reshape(-1), "amin")
    return running - floor[segment] - 1


def packed_starts(position_ids: Tensor, real: Tensor) -> Tensor | None:
    """Where position ids (B, T) restart among the real tokens, or None when no row holds more than one sequence."""
    again = torch.zeros_like(real)
    again[:, 1:] = (position_ids[:, 1:] <= position_ids[:, :-1]) & real[:, 1:] & real[:, :-1]
    if not torch.compiler.is_compiling() and not bool(again.any()):
        return None
    again[:, 0] = True
    return again
