"""GLUE: nine tasks, one or two sentences to a class, STS-B to a score; each with its own metric, as in the paper.

A classifier reads the sentences. As a cloze (`template: cloze`) a language model reads a question about them and goes
on with a word for each class, in lm-evaluation-harness's wording; STS-B has none there.
"""

from collections.abc import Callable, Mapping
from typing import Any

from .base import ACCURACY, Hub, Item, Metric, PairTask, Row
from .fields import Fields

MATTHEWS, PEARSON = Metric("matthews"), Metric("pearson")
F1, SPEARMAN = Metric("f1"), Metric("spearman")

_COLUMNS: Mapping[str, tuple[str, str | None]] = {
    "cola": ("sentence", None),
    "sst2": ("sentence", None),
    "mrpc": ("sentence1", "sentence2"),
    "stsb": ("sentence1", "sentence2"),
    "qqp": ("question1", "question2"),
    "mnli": ("premise", "hypothesis"),
    "qnli": ("question", "sentence"),
    "rte": ("sentence1", "sentence2"),
    "wnli": ("sentence1", "sentence2"),
}
_TRUE_OR_FALSE = "{sentence1}\nQuestion: {sentence2} True or False?\nAnswer:"
_WORDING: Mapping[str, tuple[str, tuple[str, ...]]] = {  # the question, and the word for each class
    "cola": ("{sentence1}\nQuestion: Does this sentence make sense?\nAnswer:", ("no", "yes")),
    "sst2": ("{sentence1}\nQuestion: Is this sentence positive or negative?\nAnswer:", ("negative", "positive")),
    "mrpc": (
        "Sentence 1: {sentence1}\nSentence 2: {sentence2}\nQuestion: Do both sentences mean the same thing?\nAnswer:",
        ("no", "yes"),
    ),
    "qqp": (
        "Question 1: {sentence1}\nQuestion 2: {sentence2}\nQuestion: Do both questions ask the same thing?\nAnswer:",
        ("no", "yes"),
    ),
    "mnli": ("{sentence1}\nQuestion: {sentence2} True, False or Neither?\nAnswer:", ("True", "Neither", "False")),
    "qnli": (
        "{sentence1}\n{sentence2}\nQuestion: Does this response answer the question?\nAnswer:",
        ("yes", "no"),
    ),
    "rte": (_TRUE_OR_FALSE, ("True", "False")),
    "wnli": (_TRUE_OR_FALSE, ("False", "True")),
}
_METRICS = {"cola": (MATTHEWS, ACCURACY), "stsb": (PEARSON, SPEARMAN), "mrpc": (ACCURACY, F1), "qqp": (ACCURACY, F1)}
_LABELS = {"mnli": 3, "stsb": 1}


def _hub(name: str) -> Hub:
    first, second = _COLUMNS[name]

    def row(r: Row) -> dict[str, Any]:
        return {"sentence1": r[first], "sentence2": r[second] if second else None, "label": r["label"]}

    validation = "validation_matched" if name == "mnli" else "validation"
    return Hub("nyu-mll/glue", name, {"train": "train", "validation": validation}, row)  # the test labels are hidden


def _cloze(name: str) -> Callable[[Row], Item] | None:
    if name not in _WORDING:
        return None
    wording, words = _WORDING[name]

    def read(row: Row) -> Item:
        second = row.get("sentence2")
        if name == "mnli":  # the harness ends a hypothesis with a full stop
            second = str(second).strip().removesuffix(".") + "."
        prompt = wording.format(sentence1=row["sentence1"], sentence2=second)
        choices, index = tuple(f" {word}" for word in words), int(row["label"])
        return Item(prompt, prompt, choices[index], words[index], choices, index)

    return read


def _fields(name: str) -> Fields:
    pair, classes = _COLUMNS[name][1] is not None, _LABELS.get(name, 2)
    texts, maybe = (("sentence1", "sentence2"), ()) if pair else (("sentence1",), ("sentence2",))
    return (
        Fields(texts, maybe, number="label") if classes == 1 else Fields(texts, maybe, index="label", classes=classes)
    )


TASKS = [
    PairTask(
        name,
        "glue",
        _LABELS.get(name, 2),
        _METRICS.get(name, (ACCURACY,)),
        hub=_hub(name),
        cloze=_cloze(name),
        fields=_fields(name),
    )
    for name in _COLUMNS
]
