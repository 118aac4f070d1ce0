"""Instruction following: Alpaca and UltraFeedback to train on, UltraFeedback pairs and AlpacaEval to be judged on.

The prompt is Alpaca's template, or the model's chat template if the grid says so. Without a judge there are the loss on
held-out answers and, on UltraFeedback, how often and by how much the chosen answer is likelier than the rejected one.
"""

from typing import Any

from .arithmetic import TEMPLATE
from .base import LOSS, Hub, Item, Metric, Row, TextTask
from .fields import Fields

WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:\n"
)
WIN_RATE = Metric("win_rate")
MARGIN = (Metric("preference"), Metric("margin", share=False), LOSS)


def _instruction(row: Row) -> Item:
    instruction, extra = row["instruction"], row.get("input") or ""
    prompt = (WITH_INPUT if extra else TEMPLATE).format(instruction=instruction, input=extra)
    bare = f"{instruction}\n{extra}" if extra else instruction
    return Item(prompt, bare, row["output"], row["output"])


def _pair(row: Row) -> Item:
    prompt = TEMPLATE.format(instruction=row["prompt"])
    return Item(prompt, row["prompt"], row["chosen"], row["chosen"], rejected=row["rejected"])


def _plain(r: Row) -> dict[str, Any]:
    return {"instruction": r["instruction"], "input": r["input"], "output": r["output"]}


def _asked(r: Row) -> dict[str, Any]:
    return {"instruction": r["instruction"], "input": "", "output": r["output"]}


def _binarized(r: Row) -> dict[str, Any]:
    return {"prompt": r["prompt"], "chosen": r["chosen"][-1]["content"], "rejected": r["rejected"][-1]["content"]}


_PREFS = {"train": "train_prefs", "test": "test_prefs"}
_ANSWERED = Fields(("instruction", "output"), maybe=("input",))
TASKS = [
    TextTask(
        "alpaca",
        "instruct",
        "free",
        _instruction,
        (LOSS,),
        hub=Hub("tatsu-lab/alpaca", None, {"train": "train"}, _plain),
        fields=_ANSWERED,
    ),
    TextTask("ultrafeedback_sft", "instruct", "free", _instruction, (LOSS,), fields=_ANSWERED),
    TextTask(
        "ultrafeedback",
        "instruct",
        "free",
        _pair,
        (*MARGIN, WIN_RATE),
        hub=Hub("HuggingFaceH4/ultrafeedback_binarized", None, _PREFS, _binarized),
        fields=Fields(("prompt", "chosen", "rejected")),
    ),
    TextTask(
        "alpaca_eval",
        "instruct",
        "free",
        _instruction,
        (WIN_RATE, LOSS),
        trains=False,
        hub=Hub("tatsu-lab/alpaca_eval", None, {"test": "train"}, _asked, "alpaca_eval.json"),
        fields=_ANSWERED,
    ),
]
