"""What would go wrong in training without a word: rows with several answers."""

import warnings

import pytest
import torch

from conftest import tiny_llama
from reftune import ReftConfig, get_reft_model

IDS = torch.tensor([[5, 6, 7, 8, 9, 10, 11, 12], [3, 4, 5, 6, 7, 8, 0, 0]])
MASK = (IDS != 0).long()


def labels(*answered: list[int]) -> torch.Tensor:
    found = torch.full_like(IDS, -100)
    for row, columns in enumerate(answered):
        found[row, columns] = IDS[row, columns]
    return found


def adapted(positions: str, **settings):
    return get_reft_model(tiny_llama(), ReftConfig(positions=positions, **settings)).train()


def step(model, wanted: torch.Tensor, **more) -> None:
    model(input_ids=IDS, attention_mask=MASK, labels=wanted, **more).loss.backward()


@pytest.mark.parametrize("positions", ["f2+l2", "l1", "mid1", "prompt", "gen", "gen:2"])
def test_several_answers_in_a_row_are_said_once(positions: str) -> None:
    model = adapted(positions)
    step(model, labels([4, 5], [4, 5]))
    with pytest.warns(UserWarning, match=r"Row 1 of this batch has several answers.*Make a row of each answer"):
        step(model, labels([4, 5, 6], [2, 4, 5]))
    step(model, labels([2, 5], [2, 4]))  # warnings are errors


def test_what_is_the_same_in_generation_is_not_said() -> None:
    for positions in ("f2", "all", "f1+all"):
        step(adapted(positions), labels([2, 5], [2, 4]))
    model = adapted("f2+l2")
    step(model, labels([2, 3], [2, 3]))  # the template's last tokens are not learned
    step(model, labels([1, 2, 5], [2]), position_ids=torch.tensor([[0, 1, 2, 0, 1, 2, 3, 4], [*range(6), 0, 0]]))
    with torch.no_grad():
        model(input_ids=IDS, attention_mask=MASK, labels=labels([2, 5], [2]))
    model.eval()(input_ids=IDS, attention_mask=MASK, labels=labels([2, 5], [2]))
    with model.disable_adapter(), warnings.catch_warnings():
        warnings.simplefilter("error")
        model.train()(input_ids=IDS, attention_mask=MASK, labels=labels([2, 5], [2]))


def test_packed_rows_are_looked_at_one_by_one() -> None:
    model = adapted("l1")
    with pytest.warns(UserWarning, match="Row 0 of this batch has several answers"):
        step(model, labels([1, 4, 6], [2]), position_ids=torch.tensor([[0, 1, 2, 0, 1, 2, 3, 4], [*range(6), 0, 0]]))


def test_labels_of_later_batches_are_not_read() -> None:
    model = adapted("l1")
    for _ in range(16):
        step(model, labels([4], [4]))
    step(model, labels([2, 5], [2, 4]))
