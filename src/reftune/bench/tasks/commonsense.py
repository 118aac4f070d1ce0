"""Commonsense reasoning: nine multiple-choice tasks in the wording of LLM-Adapters' commonsense_170k, as in the paper.

The prompt is an instruction and a line break; the answer is "the correct answer is " and a label such as `answer2`,
which the prompt names. Generated answers are scored by exact match of what follows those words.

A small model cannot name a label: as a cloze (`template: cloze`) it reads the question alone and what is learned and
compared are the answers' own words, in lm-evaluation-harness's wording.
"""

import re
from typing import Any

from ..metrics import TRIGGER
from .base import ACCURACY, ACCURACY_LL, ACCURACY_NORM, LOSS, Hub, Item, Row, TextTask
from .fields import Fields


def _item(lead: str, row: Row, labels: tuple[str, ...], options: str, end: str = "\n\n") -> Item:
    instruction = f"{lead}{options}{end}Answer format: {'/'.join(labels)}"
    index = int(row["answer"])
    choices = tuple(TRIGGER + label for label in labels)
    return Item(instruction + "\n", instruction, choices[index], labels[index], choices, index)


def _choose(lead: str, word: str, between: str = " ", end: str = "\n\n") -> Any:
    """A reader of rows for one wording: "Answer1: ... Answer2: ..." with `word` for Answer, `end` after the last."""

    def read(row: Row) -> Item:
        question = f"{row['context']} {row['question']}".strip() if row.get("context") else row["question"]
        labels = tuple(f"{word}{i + 1}" for i in range(len(row["choices"])))
        texts = between.join(f"{word.capitalize()}{i + 1}: {text}" for i, text in enumerate(row["choices"]))
        return _item(lead + question, row, labels, "\n\n" + texts, end)

    return read


def _boolq(row: Row) -> Item:
    """True or false, without the passage, as the paper has it."""
    question = str(row["question"]).removesuffix("?")
    lead = f"Please answer the following question with true or false, question: {question}?"
    return _item(lead, row, ("true", "false"), "")


def _cloze(wording: str) -> Any:
    """A reader of rows as a cloze: what is asked in `wording`, the choices as they would go on."""

    def read(row: Row) -> Item:
        question = str(row["question"])
        context = f"{row['context']} " if row.get("context") and "{context}" in wording else ""
        prompt = wording.format(question=question, context=context)
        return _go_on(prompt, row, [str(text) for text in row["choices"]])

    return read


def _boolq_cloze(row: Row) -> Item:
    """The passage is read, as in lm-evaluation-harness; its answer is yes or no."""
    question = str(row["question"]).removesuffix("?")
    return _go_on(f"{row.get('context') or ''}\nQuestion: {question}?\nAnswer:", row, ["yes", "no"])


def _hellaswag_cloze(row: Row) -> Item:
    """WikiHow's marks ([header], [title], [step]) are read in the paper's wording, and not in the harness's; where the
    row tells its own wording ("cloze"; rows of the hub do) it is taken."""
    asked = row.get("cloze") or row["question"]
    return _go_on(_unmarked(asked), row, [_unmarked(text) for text in row["choices"]])


def _unmarked(text: str) -> str:
    return re.sub(r"\[.*?\]", "", str(text).strip().replace(" [title]", ". ")).replace("  ", " ").strip()


def _winogrande_cloze(row: Row) -> Item:
    """The sentence up to the blank; each option with the rest of the sentence, all of it scored."""
    before, _, after = str(row["question"]).partition("_")
    return _go_on(before.rstrip(), row, [f"{text}{after}" for text in row["choices"]])


def _go_on(prompt: str, row: Row, texts: list[str]) -> Item:
    index, choices = int(row["answer"]), tuple(f" {text}" for text in texts)
    return Item(prompt, prompt, choices[index], texts[index], choices, index)


_QUESTION = "Please choose the correct answer to the question: "
_SOLUTION = "Please choose the correct solution to the question: "
_ENDING = "Please choose the correct ending to complete the given sentence: "
_BLANK = "Please choose the correct answer to fill in the blank to complete the given sentence: "


def _options(row: Row, question: str, choices: list[str], answer: Any, context: str = "") -> dict[str, Any] | None:
    if answer in ("", None, -1):  # a hidden label
        return None
    return {"context": context, "question": question, "choices": choices, "answer": int(answer)}


def _hellaswag(r: Row) -> dict[str, Any] | None:
    """`ctx` is the paper's, with its second half as it was cut; the harness has a capital there."""
    row = _options(r, f"{r['activity_label']}: {r['ctx']}", list(r["endings"]), r["label"])
    return row and row | {"cloze": f"{r['activity_label']}: {r['ctx_a']} {r['ctx_b'].capitalize()}"}


def _lettered(stem: str) -> Any:
    """ARC and OpenBookQA: {"text": [...], "label": ["A", ...]} and an answer key."""

    def row(r: Row) -> dict[str, Any] | None:
        labels, key = list(r["choices"]["label"]), r["answerKey"]
        return _options(r, r[stem], list(r["choices"]["text"]), labels.index(key) if key in labels else None)

    return row


_DEV = {"train": "train", "validation": "validation"}
_ALL = _DEV | {"test": "test"}
_HUB = {
    "boolq": Hub(
        "aps/super_glue",
        "boolq",
        _DEV,
        lambda r: _options(r, r["question"], ["true", "false"], 1 - r["label"], r["passage"]),
    ),
    "piqa": Hub("baber/piqa", None, _DEV, lambda r: _options(r, r["goal"], [r["sol1"], r["sol2"]], r["label"])),
    "siqa": Hub(
        "lighteval/siqa",
        None,
        _DEV,
        lambda r: _options(
            r, r["question"], [r["answerA"], r["answerB"], r["answerC"]], int(r["label"]) - 1, r["context"]
        ),
    ),
    "hellaswag": Hub("Rowan/hellaswag", None, _DEV, _hellaswag),
    "winogrande": Hub(
        "allenai/winogrande",
        "winogrande_xl",
        _DEV,
        lambda r: _options(
            r, r["sentence"], [r["option1"], r["option2"]], int(r["answer"]) - 1 if r["answer"] else None
        ),
    ),
    "arc_easy": Hub("allenai/ai2_arc", "ARC-Easy", _ALL, _lettered("question")),
    "arc_challenge": Hub("allenai/ai2_arc", "ARC-Challenge", _ALL, _lettered("question")),
    "openbookqa": Hub("allenai/openbookqa", "main", _ALL, _lettered("question_stem")),
}

_READ = {
    "boolq": _boolq,
    "piqa": _choose(_SOLUTION, "solution", "\n\n"),
    "siqa": _choose(_QUESTION, "answer"),
    "hellaswag": _choose(_ENDING, "ending"),
    "winogrande": _choose(_BLANK, "option", end=" "),
    "arc_easy": _choose(_QUESTION, "answer"),
    "arc_challenge": _choose(_QUESTION, "answer"),
    "openbookqa": _choose(_QUESTION, "answer"),
    "storycloze": _choose(_ENDING, "ending"),  # not in the paper; the wording of HellaSwag
}

_ASKED = "Question: {question}\nAnswer:"
_CLOZE = {
    "boolq": _boolq_cloze,
    "piqa": _cloze(_ASKED),
    "siqa": _cloze("Q: {context}{question}\nA:"),
    "hellaswag": _hellaswag_cloze,
    "winogrande": _winogrande_cloze,
    "arc_easy": _cloze(_ASKED),
    "arc_challenge": _cloze(_ASKED),
    "openbookqa": _cloze("{question}"),
    "storycloze": _cloze("{question}"),
}
_METRICS = (ACCURACY, ACCURACY_NORM, ACCURACY_LL, LOSS)

_FIELDS = Fields(("question",), maybe=("context",), choices=True, index="answer")
_TRUTHS = Fields(("question",), maybe=("context",), index="answer", classes=2)

TASKS = [
    TextTask(
        name,
        "commonsense",
        "choice",
        read,
        _METRICS,
        hub=_HUB.get(name),
        cloze=_CLOZE[name],
        fields=_TRUTHS if name == "boolq" else _FIELDS,
    )
    for name, read in _READ.items()
]
