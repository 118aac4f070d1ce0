"""Rows of a task: from a folder, from the hub, or, for StoryCloze, from the user's own CSV files.

    rows = load_rows(task("sst2"), "shared/data")      # DIR/glue/sst2/{train,validation,test}.jsonl.gz (or .jsonl)
    rows = load_rows(task("sst2"), None)               # the hub's nyu-mll/glue
    parts = split(task("sst2"), rows, seed=1, train=1000, select=None, test=500)

A data folder's rows have these fields: commonsense `context`, `question`, `choices`, `answer` (index); arithmetic
`question`, `answer`, `solution` (AQuA: `choices`, `answer` an index); instruct `instruction`, `input`, `output`, or
`prompt`, `chosen`, `rejected`; glue `sentence1`, `sentence2`, `label`.
"""

import csv
import hashlib
import json
import os
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .jsonl import read_lines
from .tasks import PairTask, Task
from .tasks.fields import Fields

Rows = dict[str, list[dict[str, Any]]]
SPLITS = ("train", "validation", "test")
_SHUFFLE = 0  # the order from which subsets are taken: one for all methods and seeds


@dataclass(frozen=True)
class Parts:
    """Rows to train on, to choose the learning rate by, and to be tested on; `digest` names them all."""

    train: list[dict[str, Any]]
    select: list[dict[str, Any]]
    test: list[dict[str, Any]]

    @property
    def digest(self) -> str:
        """SHA-256 (16 hex digits) of the rows in their order."""
        text = json.dumps([self.train, self.select, self.test], sort_keys=True, default=str)
        return hashlib.sha256(text.encode()).hexdigest()[:16]


def data_folder(given: str | None) -> Path | None:
    """The folder with data: what was given, else $REFTUNE_DATA, else None (the hub)."""
    name = given or os.environ.get("REFTUNE_DATA")
    if not name:
        return None
    folder = Path(name).expanduser()
    if not folder.is_dir():
        raise FileNotFoundError(f"There is no data folder {folder}. Give one with --data or REFTUNE_DATA, or none.")
    return folder


def load_rows(task: Task, folder: Path | str | None) -> Rows:
    """All rows of a task by split. From `folder` if it is given, else from the hub.

    Raises FileNotFoundError if the folder lacks the task, ValueError if the task is not on the hub, or for a file or a
    row of the folder that no run could use.
    """
    if folder is None:
        return _from_hub(task)
    place = Path(folder) / task.suite / task.name
    rows = {s: _read(path, task) for s in SPLITS if (path := _file(place, s)) is not None}
    if not rows and task.name == "storycloze" and place.is_dir():
        rows = _storycloze(place)
    if not rows:
        own = " StoryCloze may not be redistributed: put your own CSV files there." if task.name == "storycloze" else ""
        raise FileNotFoundError(f"No data for {task.name}: expected {place}/train.jsonl.gz and the like.{own}")
    return rows


def split(task: Task, rows: Rows, *, seed: int, train: int | None, select: int | None, test: int | None) -> Parts:
    """Share a task's rows out; None takes all there are (for `select` of a text task: a tenth of the training rows,
    of two or more at least one).

    GLUE: validation halved by `seed`, 1,000 rows for selection if it has over 5,000, the rest is the test (the paper's
    protocol). Text tasks: selection rows are held out of train, the test is `test`, else `validation`. Raises
    ValueError for a task without the rows it needs.
    """
    wanted = ("train", "validation") if isinstance(task, PairTask) else ("train",) if task.trains else ()
    lacking = [name for name in wanted if not rows.get(name)]
    if lacking:
        there = " and ".join(name for name in rows if rows[name])
        has = f"them in {there} alone" if there else "none"
        raise ValueError(f"{task.name} needs rows in {' and '.join(lacking)}, but has {has}.")
    if isinstance(task, PairTask):
        if len(rows["validation"]) < 2:
            raise ValueError(f"{task.name} needs at least two rows in validation: one half selects, the other tests.")
        dev = _shuffled(rows["validation"], seed)
        cut = 1000 if len(dev) > 5000 else len(dev) // 2
        return Parts(_first(_shuffled(rows["train"]), train), _first(dev[:cut], select), _first(dev[cut:], test))
    evaluated = rows.get("test") or rows.get("validation") or []
    rest = _shuffled(rows.get("train", []))
    if not evaluated:  # a hub set of one split, such as Alpaca's
        evaluated, rest = rest[: len(rest) // 20], rest[len(rest) // 20 :]
    if not evaluated:
        raise ValueError(f"{task.name} has no rows to be tested on: it needs a test or a validation split.")
    held = min(max(1, len(rest) // 10) if select is None else select, len(rest) // 2)
    return Parts(_first(rest[held:], train), rest[:held], _first(_shuffled(evaluated), test))


def _shuffled(rows: list[dict[str, Any]], seed: int = _SHUFFLE) -> list[dict[str, Any]]:
    return random.Random(seed).sample(rows, len(rows))


def _first(rows: list[dict[str, Any]], count: int | None) -> list[dict[str, Any]]:
    return rows if count is None else rows[:count]


def _file(place: Path, name: str) -> Path | None:
    return next((p for end in (".jsonl.gz", ".jsonl") if (p := place / (name + end)).is_file()), None)


def _read(path: Path, task: Task) -> list[dict[str, Any]]:
    rows = []
    for number, row in read_lines(path):
        _refuse(task.fields.wrong(row), path, number)
        rows.append(row)
    return rows


def _refuse(wrong: str | None, path: Path, number: int) -> None:
    if wrong is not None:
        raise ValueError(f"{path}, row {number}: {wrong}. Mend the row or take it out.")


def _from_hub(task: Task) -> Rows:
    if task.hub is None:
        raise ValueError(
            f"{task.name} is not on the hub under an id that reftune knows. Give a folder with {task.suite}/"
            f"{task.name}/train.jsonl.gz and the like (--data DIR, or REFTUNE_DATA)."
        )
    try:
        import datasets
    except ImportError as error:
        raise ImportError("Reading the hub's data sets needs `datasets`: pip install 'reftune[bench]'.") from error
    hub = task.hub
    found: Rows = {}
    for ours, theirs in hub.splits.items():
        if hub.file is None:
            raw = datasets.load_dataset(hub.path, hub.config, split=theirs)
        else:
            raw = datasets.load_dataset("json", data_files=f"hf://datasets/{hub.path}/{hub.file}", split=theirs)
        found[ours] = [row for row in map(hub.row, raw) if row is not None]
    return found


def _storycloze(place: Path) -> Rows:
    """The authors' CSV files: those with "val" in their names are trained on, the others evaluated (if any).

    A file without the column of right endings, as the authors' later tests, cannot be scored and is left out.
    """
    rows: Rows = {}
    for path in sorted(place.glob("*.csv")):
        try:
            with path.open(encoding="utf-8", newline="") as file:
                read = list(csv.DictReader(file))
        except UnicodeDecodeError as error:
            raise ValueError(f"{path} is not UTF-8 text: save it as UTF-8.") from error
        if read and "AnswerRightEnding" in read[0]:
            for number, row in enumerate(read, 1):
                _refuse(_wrong_story(row), path, number)
            rows.setdefault("train" if "val" in path.name.lower() else "test", []).extend(map(_story, read))
    if rows.get("train") and not rows.get("test"):
        whole = _shuffled(rows["train"])
        rows = {"train": whole[: len(whole) // 2], "test": whole[len(whole) // 2 :]}
    return rows


_SENTENCES = tuple(f"InputSentence{i}" for i in range(1, 5))
_ENDINGS = ("RandomFifthSentenceQuiz1", "RandomFifthSentenceQuiz2")


def _wrong_story(row: dict[str, str]) -> str | None:
    if str(right := row["AnswerRightEnding"]).strip() not in ("1", "2"):
        return f"AnswerRightEnding must be 1 or 2, but is {right!r}"
    return Fields((*_SENTENCES, *_ENDINGS)).wrong(row)


def _story(row: dict[str, str]) -> dict[str, Any]:
    story = " ".join(row[name] for name in _SENTENCES)
    return {
        "context": "",
        "question": story,
        "choices": [row[name] for name in _ENDINGS],
        "answer": int(row["AnswerRightEnding"]) - 1,
    }
