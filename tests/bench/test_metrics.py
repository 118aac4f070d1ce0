"""Scores: answers read as the paper reads them, GLUE's metrics against their definitions."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from reftune.bench.metrics import answer_of_choice, first_letter, glue_scores, last_number, right


def test_an_answer_is_all_that_follows_the_first_trigger() -> None:
    assert answer_of_choice(" the correct answer is answer2 \n") == "answer2"
    assert answer_of_choice("the correct answer is a the correct answer is b") == "a the correct answer is b"
    assert right("choice", "the correct answer is answer2", "answer2")
    assert not right("choice", "the correct answer is answer2.", "answer2")
    assert not right("choice", "the correct answer is Answer2", "answer2")
    assert not right("choice", "answer2", "answer2")


def test_the_last_number_counts() -> None:
    assert last_number("X=3+4\nThe answer is 1,207.50.") == 1207.5
    assert last_number("It is -3") == -3
    assert math.isnan(last_number("no idea"))
    assert right("number", "The answer is 0.3334.", 1 / 3)
    assert not right("number", "The answer is 0.335.", 1 / 3)
    assert not right("number", "no idea", 0.0)


@given(st.floats(-1e6, 1e6).map(lambda x: round(x, 3)))
def test_a_number_as_training_writes_it_is_read_back(number: float) -> None:
    assert right("number", f"The answer is {number:.10g}.", number) or "e" in f"{number:.10g}"


def test_the_first_letter_counts() -> None:
    assert first_letter("The answer is C.") == "C"
    assert first_letter("nothing") == ""
    assert right("letter", "(B) or D", "B")
    with pytest.raises(ValueError, match="no right one"):
        right("free", "a", "a")


def test_glue_scores_by_hand() -> None:
    truth, said = [1, 1, 0, 0], [1, 0, 0, 1]
    assert glue_scores("sst2", said, truth) == {"accuracy": 0.5}
    # tp 1, fp 1, fn 1, tn 1: F1 = 2/4; Matthews = 0
    assert glue_scores("mrpc", said, truth) == {"accuracy": 0.5, "f1": 0.5}
    assert glue_scores("cola", said, truth) == {"matthews": 0.0, "accuracy": 0.5}
    assert glue_scores("cola", [1, 1, 0, 1], truth)["matthews"] == pytest.approx(2 / math.sqrt(3 * 2 * 2 * 1))
    scores = glue_scores("stsb", [1.0, 2.0, 3.0], [2.0, 4.0, 6.0])
    assert scores == {"pearson": pytest.approx(1.0), "spearman": pytest.approx(1.0)}
    assert glue_scores("stsb", [1.0, 1.0, 1.0], [2.0, 4.0, 6.0]) == {"pearson": 0.0, "spearman": 0.0}
    assert glue_scores("stsb", [1.0], [2.0]) == {"pearson": 0.0, "spearman": 0.0}  # scipy raises
    with pytest.raises(ValueError, match="2 predictions for 3"):
        glue_scores("rte", [1, 1], [1, 1, 0])
