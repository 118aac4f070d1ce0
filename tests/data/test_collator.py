"""Batches: padding, and a prompt mask that agrees with the labels."""

import pytest
from tests.tiny_chat import tiny_tokenizer

from reftune.data import ReftDataCollator

ROWS = [
    {"input_ids": [5, 6, 7, 8], "labels": [-100, -100, 7, 8]},
    {"input_ids": [5, 6], "labels": [-100, 6]},
]


def test_right_padding() -> None:
    batch = ReftDataCollator(tiny_tokenizer())(ROWS)
    assert batch["input_ids"].tolist() == [[5, 6, 7, 8], [5, 6, 2, 2]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 1], [1, 1, 0, 0]]
    assert batch["labels"].tolist() == [[-100, -100, 7, 8], [-100, 6, -100, -100]]
    assert batch["prompt_mask"].tolist() == [[1, 1, 0, 0], [1, 0, 0, 0]]


def test_left_padding_and_multiples() -> None:
    batch = ReftDataCollator(tiny_tokenizer(), padding_side="left", pad_to_multiple_of=3)(ROWS)
    assert batch["input_ids"].tolist() == [[2, 2, 5, 6, 7, 8], [2, 2, 2, 2, 5, 6]]
    assert batch["prompt_mask"].tolist() == [[0, 0, 1, 1, 0, 0], [0, 0, 0, 0, 1, 0]]


def test_a_masked_token_inside_the_response_is_no_prompt() -> None:
    batch = ReftDataCollator(tiny_tokenizer())([{"input_ids": [5, 6, 7, 8], "labels": [-100, 6, -100, 8]}])
    assert batch["prompt_mask"].tolist() == [[1, 0, 0, 0]]


@pytest.mark.parametrize(
    ("row", "says"),
    [
        ({"input_ids": [1, 2]}, "no labels"),
        ({"input_ids": [1, 2], "labels": [1, 2]}, "no prompt"),
        ({"input_ids": [1, 2], "labels": [-100, -100]}, "no response"),
        ({"input_ids": [1, 2], "labels": [-100]}, "2 input_ids and 1 labels"),
    ],
)
def test_rows_without_prompt_or_response_are_refused(row: dict, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        ReftDataCollator(tiny_tokenizer())([row])
