"""Scores of answers and of predictions: pure functions.

answer_of_choice("the correct answer is answer2")   # "answer2"
last_number("so 3 + 4 = 7 books")                    # 7.0
glue_scores("cola", predictions, labels)             # {"matthews": ..., "accuracy": ...}
"""

import math
import re
import warnings
from collections.abc import Sequence

TRIGGER = "the correct answer is "


def answer_of_choice(generated: str) -> str:
    """What follows the first "the correct answer is " of a generated text, without the space around it; else ""."""
    return generated.partition(TRIGGER)[2].strip()


def last_number(text: str) -> float:
    """The last number in a text, thousands commas dropped; nan if there is none."""
    found = re.findall(r"-?\d+\.?\d*", text.replace(",", ""))
    return float(found[-1]) if found else math.nan


def first_letter(text: str) -> str:
    """The first capital A to E in a text, or ""."""
    found = re.search(r"[A-E]", text)
    return found[0] if found else ""


def right(kind: str, generated: str, gold: str | float) -> bool:
    """Whether a generated answer is the right one: kind "choice", "number" (|Δ| <= 1e-3) or "letter"."""
    if kind == "choice":
        return answer_of_choice(generated) == gold
    if kind == "number":
        return abs(last_number(generated) - float(gold)) <= 1e-3  # nan compares False
    if kind == "letter":
        return first_letter(generated) == gold
    raise ValueError(f"Answers of kind {kind!r} have no right one.")


def glue_scores(task: str, predictions: Sequence[float], labels: Sequence[float]) -> dict[str, float]:
    """GLUE's own metrics of a task: Matthews (CoLA), Pearson and Spearman (STS-B), F1 (MRPC, QQP), accuracy.

    A correlation with constant predictions, or of one row, is 0, not nan.
    """
    from scipy.stats import pearsonr, spearmanr
    from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef

    if len(predictions) != len(labels) or not len(labels):
        raise ValueError(f"{len(predictions)} predictions for {len(labels)} labels: give as many, and at least one.")
    if task == "stsb":
        if len(labels) == 1:  # scipy raises
            return {"pearson": 0.0, "spearman": 0.0}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # constant input: said by the 0
            found = {"pearson": pearsonr(predictions, labels)[0], "spearman": spearmanr(predictions, labels)[0]}
        return {name: float(value) if math.isfinite(value) else 0.0 for name, value in found.items()}
    scores = {"accuracy": float(accuracy_score(labels, predictions))}
    if task == "cola":
        scores = {"matthews": float(matthews_corrcoef(labels, predictions)), **scores}
    if task in ("mrpc", "qqp"):
        scores["f1"] = float(f1_score(labels, predictions, zero_division=0))
    return scores
