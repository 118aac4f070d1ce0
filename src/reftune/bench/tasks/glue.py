"""GLUE: nine tasks, one or two sentences to a class, STS-B to a score; each with its own metric, as in the paper."""

from collections.abc import Mapping
from typing import Any

from .base import ACCURACY, Hub, Metric, PairTask, Row

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
_METRICS = {"cola": (MATTHEWS, ACCURACY), "stsb": (PEARSON, SPEARMAN), "mrpc": (ACCURACY, F1), "qqp": (ACCURACY, F1)}
_LABELS = {"mnli": 3, "stsb": 1}


def _hub(name: str) -> Hub:
    first, second = _COLUMNS[name]

    def row(r: Row) -> dict[str, Any]:
        return {"sentence1": r[first], "sentence2": r[second] if second else None, "label": r["label"]}

    validation = "validation_matched" if name == "mnli" else "validation"
    return Hub("nyu-mll/glue", name, {"train": "train", "validation": validation}, row)  # the test labels are hidden


TASKS = [
    PairTask(name, "glue", _LABELS.get(name, 2), _METRICS.get(name, (ACCURACY,)), hub=_hub(name)) for name in _COLUMNS
]
