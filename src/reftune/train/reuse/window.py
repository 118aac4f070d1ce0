"""A padded batch → its rows → the tokens of each row that must be computed, laid out so that all prompts end in one
column.

    row      p p p p p | s s r r r x        p: before the first token that matters, s: edited suffix, r: response
             the head  | the window  ^ what follows the last label predicts nothing and is left out

Heads are padded on the left, windows on the right, so one column splits the batch. The first token of a window is the
first edited one, or the one before the first label if that comes earlier.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ...positions import layout, parse, select_group

IGNORE = -100
KNOWN = {"input_ids", "attention_mask", "labels", "prompt_mask", "position_ids"}


class NotReusableError(ValueError):
    """This batch, or this model, cannot be split; the message says why, to go behind "because"."""


@dataclass(frozen=True)
class Row:
    """One example without padding. ids, labels: (n,) int64 on the CPU; 0 ≤ start < end ≤ n bound its window."""

    ids: Tensor
    labels: Tensor
    prompt: int  # tokens of the prompt
    start: int
    end: int

    @property
    def head(self) -> Tensor:
        return self.ids[: self.start]

    @property
    def targets(self) -> Tensor:
        """The places, from the window's start, of the tokens that predict a label: (t,) int64."""
        return (self.labels[self.start + 1 : self.end + 1] != IGNORE).nonzero().squeeze(1)


def read_rows(inputs: Mapping[str, Any], expressions: Iterable[str], split: bool, select: bool = True) -> list[Row]:
    """The rows of a batch of (B, L) tensors.

    Args:
        inputs: what a collator made: input_ids and labels, and any of attention_mask, prompt_mask and position_ids.
        expressions: positions of the adapters that edit.
        split: False lets every window begin at the first token.
        select: the head will run on the rows that predict a label only; else the last labelled token stays in the
            window, because the loss shifts labels within it.

    Raises NotReusableError if the batch holds anything else, or is packed, or is padded so that places cannot be told.
    """
    unknown = sorted(k for k, v in inputs.items() if k not in KNOWN and isinstance(v, Tensor))
    if unknown:
        raise NotReusableError(f"the batch holds {', '.join(unknown)}, of which reftune knows nothing")
    if inputs.get("adapter_names") is not None:
        raise NotReusableError("its rows name adapters of their own")
    ids, labels = inputs.get("input_ids"), inputs.get("labels")
    if not isinstance(ids, Tensor) or not isinstance(labels, Tensor) or ids.dim() != 2 or labels.shape != ids.shape:
        raise NotReusableError("the batch has no input_ids with labels of the same shape, (batch, tokens)")
    ids, labels = ids.cpu(), labels.cpu()
    real = _real(inputs.get("attention_mask"), ids)
    first = real.long().argmax(1)
    length = real.sum(1)
    position_ids = inputs.get("position_ids")
    if position_ids is None:
        if bool((first > 0).any()):
            raise NotReusableError("the batch is padded on the left and has no position_ids; pad on the right")
    else:
        _check_places(position_ids.cpu().expand(ids.shape), real, first)
    if bool((labels[torch.arange(len(ids), device=ids.device), first] != IGNORE).logical_and(first > 0).any()):
        raise NotReusableError("a row that is padded on the left has a label on its first token")

    prompt_mask = inputs.get("prompt_mask")
    answers = labels != IGNORE if prompt_mask is None else prompt_mask.cpu() == 0
    places = layout(real, answers)
    edited = torch.zeros_like(real)
    for expression in expressions:
        terms = parse(expression)
        edited |= select_group(terms, places, terms)
    prompts = (places.index >= 0).sum(1)
    rows = []
    for row in range(len(ids)):
        columns = slice(int(first[row]), int(first[row] + length[row]))
        own = edited[row, columns].nonzero()
        earliest = int(own[0]) if len(own) else None
        rows.append(_row(ids[row, columns], labels[row, columns], int(prompts[row]), earliest, split, select))
    return rows


def _row(ids: Tensor, labels: Tensor, prompt: int, edited: int | None, split: bool, select: bool) -> Row:
    targets = (labels[1:] != IGNORE).nonzero().squeeze(1) + 1
    last = int(targets[-1]) + (not select) if len(targets) else 1
    end = max(last, prompt)  # the prompt whole: its length says where it ends
    start = end - 1
    if len(targets):
        start = min(start, int(targets[0]) - 1)
    if edited is not None:
        start = min(start, edited)
    return Row(ids, labels, prompt, start if split else 0, end)


def _real(mask: Any, ids: Tensor) -> Tensor:
    """(B, L) bool: the tokens that are no padding; they must be one run in each row."""
    if mask is None:
        return torch.ones_like(ids, dtype=torch.bool)
    if not isinstance(mask, Tensor) or mask.shape != ids.shape:
        raise NotReusableError("the attention mask is not (batch, tokens)")
    real = mask.cpu() != 0
    starts = real[:, :1].long().sum(1) + (real[:, 1:] & ~real[:, :-1]).sum(1)
    if bool((starts != 1).any()):
        raise NotReusableError("the attention mask has holes, or masks a whole row")
    return real


def _check_places(position_ids: Tensor, real: Tensor, first: Tensor) -> None:
    expected = torch.arange(real.shape[1], device=real.device).unsqueeze(0) - first.unsqueeze(1)
    if bool(((position_ids != expected) & real).any()):
        raise NotReusableError("position_ids do not count each row's tokens from 0: packed rows are not split")


@dataclass(frozen=True)
class Window:
    """The windows of a batch as tensors; B rows, W columns, behind `past` columns of heads.

    input_ids, position_ids, prompt_mask, labels: (B, W). attention_mask: (B, past + W). rows: (N + 1,) the flattened
    places of the N tokens that predict a label, and one more; targets: (1, N + 1), shifted as a loss that shifts
    expects, so that `logits[i]` predicts `targets[i + 1]` and the last logits nothing.
    """

    past: int
    input_ids: Tensor
    position_ids: Tensor
    prompt_mask: Tensor
    attention_mask: Tensor
    labels: Tensor
    rows: Tensor
    targets: Tensor


def lay_out(rows: Sequence[Row], pad: int, device: torch.device | str = "cpu") -> Window:
    """Heads on the left of one column, windows on its right; `pad` fills."""
    past = max(row.start for row in rows)
    width = max(row.end - row.start for row in rows)
    made: Any = {"dtype": torch.long, "device": rows[0].ids.device}
    size = (len(rows), width)
    ids = torch.full(size, pad, **made)
    labels = torch.full(size, IGNORE, **made)
    prompt = torch.zeros(size, **made)
    places = torch.zeros(size, **made)
    mask = torch.zeros(len(rows), past + width, **made)
    chosen, targets = [], [torch.tensor([IGNORE], **made)]
    for number, row in enumerate(rows):
        count = row.end - row.start
        ids[number, :count] = row.ids[row.start : row.end]
        labels[number, :count] = row.labels[row.start : row.end]
        prompt[number, : max(0, row.prompt - row.start)] = 1
        places[number] = (row.start + torch.arange(width, **made)).clamp(max=row.end - 1)
        mask[number, past - row.start : past + count] = 1
        chosen.append(row.targets + number * width)
        targets.append(row.labels[row.start + 1 + row.targets])
    chosen.append(torch.zeros(1, **made))
    packed = [ids, places, prompt, mask, labels, torch.cat(chosen), torch.cat(targets).unsqueeze(0)]
    return Window(past, *(tensor.to(device) for tensor in packed))
