"""What is wrong with a grid, said before hours of training: values, methods, the model, data, packages, the judge.

check_values(grid); check_training(jobs(grid)); check_methods(jobs(grid))      # by `load_grid`
check_grounds(grid, folder)                        # by `run_grid`, which alone needs the model, the data and the judge
"""

import importlib.util
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from reftune.models import check_model
from reftune.train.recipe_file import RecipeError
from reftune.train.values import at_least, check_dtype, check_scheduler

from .data import load_rows, split
from .judge import check_judge
from .methods import configuration
from .models import ENCODER, encoder_source
from .tasks import SUITES, task
from .tasks.instruct import WIN_RATE

if TYPE_CHECKING:
    from .grid import Grid, Job

# the least that a number may be
_LEAST: dict[str, dict[str, float]] = {
    "train": {
        **{"steps": 1, "batch_size": 1, "gradient_accumulation_steps": 1, "max_length": 2, "checkpoint_steps": 1},
        **{"epochs": 1e-9, "head_lr": 1e-12, "warmup": 0, "weight_decay": 0, "max_grad_norm": 0},
    },
    "rows": {"train": 1, "select": 1, "test": 1},
    "sweep": {"steps": 1, "seed": 0},
    "scoring": {"batch_size": 1, "max_new_tokens": 1},
}
# arguments of `generate` that are not the grid's to give
_FIXED = {
    "max_new_tokens": "set scoring.max_new_tokens",
    "pad_token_id": "the tokenizer's is taken",
    "num_return_sequences": "a prompt has one answer",
    "return_dict_in_generate": "answers are all that is read",
}


def check_values(grid: "Grid") -> None:
    """Raise RecipeError for a value that no run could use."""
    for section, least in _LEAST.items():
        at_least(section, vars(getattr(grid, section)), least)
    if min(grid.seeds, default=0) < 0:
        raise RecipeError(f"seeds must be whole numbers of at least 0, but are {grid.seeds}.")
    _budget("train", vars(grid.train), grid.classifies)
    _names(grid)
    _per_task(grid)


def _budget(where: str, values: Mapping[str, Any], classifies: bool) -> None:
    check_scheduler(where, values["lr_scheduler"])
    if values["keep"] == "best" and not classifies:
        raise RecipeError(f"{where}.keep: best is for GLUE's classifiers, which are scored after every epoch.")


def _names(grid: "Grid") -> None:
    from transformers import GenerationConfig
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    check_dtype("dtype", grid.dtype)
    if grid.model == ENCODER and not grid.classifies:
        raise RecipeError(f"model {ENCODER} is an encoder, which classifies; answers in words want a language model.")
    ways = ["eager", *ALL_ATTENTION_FUNCTIONS.valid_keys()]
    if grid.attention is not None and grid.attention not in ways and "/" not in grid.attention:  # a kernel of the hub
        raise RecipeError(f"attention {grid.attention!r} is none of {', '.join(ways)}.")
    if grid.template == "cloze":
        lacking = [n for n in grid.tasks or SUITES[grid.suite] if getattr(task(n), "cloze", None) is None]
        if lacking:
            raise RecipeError(
                "template: cloze is a wording of the commonsense tasks and of GLUE's classes; "
                f"{', '.join(lacking)} has none."
            )
        if not grid.scoring.loglikelihood:
            raise RecipeError("template: cloze compares likelihoods and nothing is generated: set loglikelihood: true.")
    unknown = set(grid.scoring.generation) - set(vars(GenerationConfig()))
    if unknown:
        raise RecipeError(f"scoring.generation: {', '.join(sorted(unknown))} is no argument of transformers' generate.")
    for name in _FIXED.keys() & grid.scoring.generation:
        raise RecipeError(f"scoring.generation.{name}: {_FIXED[name]}.")


def _per_task(grid: "Grid") -> None:
    if not grid.per_task:
        return
    if grid.suite != "glue" if grid.joint is None else grid.joint:
        raise RecipeError("per_task is for suites that train once a task; here one training serves them all.")
    for name, own in grid.per_task.items():
        if name not in (grid.tasks or SUITES[grid.suite]):
            raise RecipeError(f"per_task names {name}, which is not among the grid's tasks.")
        if not isinstance(own, Mapping):
            raise RecipeError(f"per_task.{name} must be keys with values, such as {{positions: f1}}, but is {own!r}.")


def check_methods(found: "Iterable[Job]") -> None:
    """Raise RecipeError for settings that a method's own config refuses, or a budget that is none."""
    for job in found:
        where = f"train of {job.method.name}"
        at_least(where, job.settings["train"], _LEAST["train"])
        _budget(where, job.settings["train"], job.classifies)
        if job.settings["train"]["head_lr"] is not None and not job.classifies:
            raise RecipeError("train.head_lr is the rate of a classifier's head, and a language model has none.")
        try:
            steps = job.settings["train"]["steps"] or 100  # any number: by epochs, the rows decide
            configuration(job.method, head=["classifier"] if job.classifies else [], steps=steps)
        except (TypeError, ValueError) as error:
            said = str(error).replace("__init__() got an unexpected keyword argument", "has no setting")
            raise RecipeError(f"The method {job.method.name} ({job.task}): {said}") from error


def check_training(found: "Iterable[Job]") -> None:
    """Raise RecipeError for a run that would train on other tasks than the grid names, or on none."""
    for job in found:
        if job.classifies and (len(job.tasks) > 1 or job.train_tasks != job.tasks):
            raise RecipeError(
                f"{job.task}: a classifier is trained on the task that it is scored on, for each has its own head. "
                "Leave joint and train_tasks out, or ask a language model (template: cloze)."
            )
        if job.method.method != "base" and not any(task(name).trains for name in job.train_tasks):
            raise RecipeError(f"{job.task}: no task with rows to train on. Name some in train_tasks.")


def check_grounds(grid: "Grid", folder: Path | None) -> None:
    """Raise what would otherwise be raised by each run, or after training: no such model, an encoder where answers are
    in words, rows that are not there, a judge without its key ..."""
    check_model(encoder_source(grid.model), causal=not grid.classifies)
    names = dict.fromkeys([*(grid.tasks or SUITES[grid.suite]), *(grid.train_tasks or ())])
    if grid.suite == "glue":
        for package in ("sklearn", "scipy"):
            if importlib.util.find_spec(package) is None:
                raise ImportError(f"GLUE's metrics need the package {package}: pip install 'reftune[bench]'.")
    if grid.scoring.judge is not None and any(WIN_RATE in task(name).metrics for name in names):
        check_judge(grid.scoring.judge)
    for name in names:
        rows = load_rows(task(name), folder)
        split(task(name), rows, seed=0, train=grid.rows.train, select=grid.rows.select, test=grid.rows.test)
