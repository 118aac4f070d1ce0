"""Pad tokenised rows into a batch that says itself where the prompt is.

collator = ReftDataCollator(tokenizer)
batch = collator([{"input_ids": [5, 6, 7], "labels": [-100, -100, 7]}])
# input_ids, attention_mask, labels, prompt_mask: each (1, 3)
"""

from collections.abc import Mapping, Sequence
from dataclasses import InitVar, dataclass
from typing import Any, Literal

import torch
from torch import Tensor

IGNORE = -100


@dataclass
class ReftDataCollator:
    """Rows of {"input_ids", "labels"} to tensors of (batch, longest row), int64.

    `prompt_mask` is 1 on the tokens before the first label. The labels say the same, but a Trainer takes them out of
    the batch for label smoothing and for a loss function of one's own; the mask always reaches the model.

    Args:
        tokenizer: for its `pad_token_id` (`eos_token_id`, else 0, where it has none: the mask is what counts).
        padding_side: "right" for training.
        pad_to_multiple_of: round the length up, for speed on some hardware.

    Raises:
        ValueError: a row without `labels`, or one whose labels leave no prompt or no response.
    """

    tokenizer: InitVar[Any]  # not kept: a Trainer saves the tokenizer of its collator into every checkpoint
    padding_side: Literal["right", "left"] = "right"
    pad_to_multiple_of: int | None = None

    def __post_init__(self, tokenizer: Any) -> None:
        known = [token for token in (tokenizer.pad_token_id, tokenizer.eos_token_id) if token is not None]
        self.pad_token_id: int = known[0] if known else 0

    def __call__(self, features: Sequence[Mapping[str, Sequence[int]]]) -> dict[str, Tensor]:
        length = max(len(row["input_ids"]) for row in features)
        if self.pad_to_multiple_of:
            length = -(-length // self.pad_to_multiple_of) * self.pad_to_multiple_of
        batch: dict[str, list[list[int]]] = {"input_ids": [], "attention_mask": [], "labels": [], "prompt_mask": []}
        for row in features:
            prompt, total = self._prompt_length(row), len(row["input_ids"])
            columns = {
                "input_ids": (list(row["input_ids"]), self.pad_token_id),
                "attention_mask": ([1] * total, 0),
                "labels": (list(row["labels"]), IGNORE),
                "prompt_mask": ([1] * prompt + [0] * (total - prompt), 0),
            }
            for name, (values, fill) in columns.items():
                padding = [fill] * (length - total)
                batch[name].append(values + padding if self.padding_side == "right" else padding + values)
        return {name: torch.tensor(rows, dtype=torch.long) for name, rows in batch.items()}

    def _prompt_length(self, row: Mapping[str, Sequence[int]]) -> int:
        if "labels" not in row:
            raise ValueError(f"A row has the keys {', '.join(row)} and no labels: tokenise with reftune.data.tokenize.")
        labels = row["labels"]
        if len(labels) != len(row["input_ids"]):
            raise ValueError(f"A row has {len(row['input_ids'])} input_ids and {len(labels)} labels: give as many.")
        first = next((i for i, label in enumerate(labels) if label != IGNORE), None)
        if first is None:
            raise ValueError("A row has no label other than -100: there is no response to learn.")
        if first == 0:
            raise ValueError(
                "The labels of a row begin at its first token, so it has no prompt to edit: mask it (-100)."
            )
        return first
