"""What a task is: how a row of data becomes something to read and to answer, and how answers are scored.

A `TextTask` is answered in words by a causal language model, a `PairTask` (GLUE) by a classifier, or in words too, as a
cloze. Rows are plain dicts in the layout of the data folder (see `reftune.bench.data`), whatever they were read from.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from .fields import ANYTHING, Fields

Row = Mapping[str, Any]


@dataclass(frozen=True)
class Item:
    """One example of a text task.

    prompt: the whole text before the answer, in the paper's words; instruction: the bare request, for a chat template.
    response: what is learned; gold: what a generated answer must give. choices: the responses to compare by
    log-likelihood, the right one at `index`; rejected: a worse response, for a preference margin.
    """

    prompt: str
    instruction: str
    response: str
    gold: str | float = ""
    choices: tuple[str, ...] = ()
    index: int = -1
    rejected: str | None = None


@dataclass(frozen=True)
class Hub:
    """Where the hub keeps a task: a data set, its configuration, our split names for its own, and its rows as ours.

    `file` names a JSON file of the data set that is read instead of its splits.
    """

    path: str
    config: str | None
    splits: Mapping[str, str]
    row: Callable[[Row], dict[str, Any] | None]  # None leaves the row out
    file: str | None = None


@dataclass(frozen=True)
class Metric:
    """A number reported for a task; `share` ones lie in [0, 1] (or are correlations) and are shown as percent."""

    name: str
    share: bool = True
    higher: bool = True


@dataclass(frozen=True)
class TextTask:
    """A task answered in words. `kind` says how: one of given choices, a number, a letter, or free text."""

    name: str
    suite: str
    kind: Literal["choice", "number", "letter", "free"]
    item: Callable[[Row], Item]
    metrics: tuple[Metric, ...]
    trains: bool = True  # has training rows
    hub: Hub | None = None
    cloze: Callable[[Row], Item] | None = None  # the same row as a text to go on with, its choices the ways to go on
    fields: Fields = ANYTHING


@dataclass(frozen=True)
class PairTask:
    """A GLUE task: one or two sentences to a class (`labels` many) or to a score (labels=1)."""

    name: str
    suite: str
    labels: int
    metrics: tuple[Metric, ...]
    hub: Hub | None = None
    trains: bool = True
    cloze: Callable[[Row], Item] | None = None  # its choices are the classes in order; None: a score has no words
    fields: Fields = ANYTHING


Task = TextTask | PairTask

ACCURACY = Metric("accuracy")
ACCURACY_LL = Metric("accuracy_ll")
ACCURACY_NORM = Metric("accuracy_norm")
LOSS = Metric("loss", share=False, higher=False)
