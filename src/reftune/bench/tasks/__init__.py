"""The suites and their tasks by name.

task("arc_easy").metrics, SUITES["glue"]     # a task; the names in a suite
"""

import difflib

from . import arithmetic, commonsense, glue, instruct
from .base import Hub as Hub
from .base import Item as Item
from .base import Metric as Metric
from .base import PairTask as PairTask
from .base import Task as Task
from .base import TextTask as TextTask

_SUITES: dict[str, list[Task]] = {
    "commonsense": [*commonsense.TASKS],
    "arithmetic": [*arithmetic.TASKS],
    "instruct": [*instruct.TASKS],
    "glue": [*glue.TASKS],
}
SUITES: dict[str, tuple[str, ...]] = {suite: tuple(task.name for task in tasks) for suite, tasks in _SUITES.items()}
_TASKS: dict[str, Task] = {task.name: task for tasks in _SUITES.values() for task in tasks}


def task(name: str) -> Task:
    """The task of that name; ValueError with the nearest known one."""
    if name not in _TASKS:
        near = difflib.get_close_matches(name, _TASKS, n=1)
        hint = f" Did you mean {near[0]!r}?" if near else f" Known: {', '.join(_TASKS)}."
        raise ValueError(f"There is no task {name!r}.{hint}")
    return _TASKS[name]
