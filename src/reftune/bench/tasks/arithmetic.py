"""Arithmetic word problems: eight tasks in Alpaca's template without input, as in the paper.

What is learned is the worked solution, or the equation where the data has no more, and "The answer is N." A generated
answer counts if its last number is within 1e-3 of the right one; for AQuA, if its first capital A to E is the letter.
"""

import re
from typing import Any

from .base import ACCURACY, LOSS, Hub, Item, Row, TextTask
from .fields import Fields

TEMPLATE = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Response:\n"
)
LETTERS = "ABCDE"


def _worked(row: Row) -> str:
    """The solution without GSM8K's calculator marks, each on its own line; nothing if the row has none."""
    text = re.sub(r"<<.*?>>", "", row.get("solution") or "").strip()
    return text + "\n" if text else ""


def _number(row: Row) -> Item:
    question, answer = row["question"], float(row["answer"])
    response = f"{_worked(row)}The answer is {answer:.10g}."
    return Item(TEMPLATE.format(instruction=question), question, response, answer)


def _letter(row: Row) -> Item:
    """The letter is learned without the worked text: its sentences begin with letters that the scoring would take."""
    options = " ".join(f"({letter}) {text}" for letter, text in zip(LETTERS, row["choices"], strict=False))
    question = f"{row['question']} Answer Choices: {options}"
    letter = LETTERS[int(row["answer"])]
    return Item(TEMPLATE.format(instruction=question), question, f"The answer is {letter}.", letter)


def _gsm8k(r: Row) -> dict[str, Any]:
    solution, _, answer = r["answer"].partition("####")
    return {"question": r["question"], "solution": solution.strip(), "answer": float(answer.replace(",", ""))}


def _aqua(r: Row) -> dict[str, Any]:
    choices = [re.sub(r"^[A-E]\)", "", option).strip() for option in r["options"]]
    return {"question": r["question"], "choices": choices, "answer": LETTERS.index(r["correct"])}


def _svamp(r: Row) -> dict[str, Any]:
    body = r["Body"].strip()
    question = f"{body if body.endswith(('.', '?')) else body + '.'} {r['Question']}"
    return {"question": question, "solution": r["Equation"], "answer": float(r["Answer"])}


def _mawps(r: Row) -> dict[str, Any]:
    return {"question": r["question"].strip(), "solution": r["equation"], "answer": float(r["result_float"])}


_TEST = {"train": "train", "test": "test"}
_HUB = {
    "gsm8k": Hub("openai/gsm8k", "main", _TEST, _gsm8k),
    "svamp": Hub("ChilleD/SVAMP", None, _TEST, _svamp),
    "multiarith": Hub(
        "ChilleD/MultiArith",
        None,
        _TEST,
        lambda r: {"question": r["question"].strip(), "solution": None, "answer": float(r["final_ans"])},
    ),
    # the default configuration: without the training rows that nearly repeat rows of the test
    "mawps": Hub("MU-NLPC/Calc-mawps", "default", _TEST | {"validation": "validation"}, _mawps),
    "aqua": Hub("deepmind/aqua_rat", "raw", _TEST | {"validation": "validation"}, _aqua),
}
_NUMBERS = ("addsub", "multiarith", "singleop", "singleeq", "mawps", "svamp", "gsm8k")

_WORKED = Fields(("question",), maybe=("solution",), number="answer")
_LETTERED = Fields(("question",), choices=True, index="answer", classes=len(LETTERS))

TASKS = [
    TextTask(n, "arithmetic", "number", _number, (ACCURACY, LOSS), hub=_HUB.get(n), fields=_WORKED) for n in _NUMBERS
]
TASKS.append(TextTask("aqua", "arithmetic", "letter", _letter, (ACCURACY, LOSS), hub=_HUB["aqua"], fields=_LETTERED))
