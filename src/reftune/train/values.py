"""Numbers and names that no training could use, said before a model is loaded; for recipes and for `reftune bench`."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from reftune.train.recipe import Recipe
from reftune.train.recipe_file import RecipeError

_TINY = 1e-12  # for "above 0"

# the least that a number of a recipe may be
_LEAST: dict[str, dict[str, float]] = {
    "data": {"limit": 1, "max_length": 2},
    "train": {
        **{"epochs": _TINY, "max_steps": 1, "batch_size": 1, "gradient_accumulation_steps": 1, "lr": 0},
        **{"head_lr": 0, "warmup": 0, "weight_decay": 0, "max_grad_norm": 0, "label_smoothing": 0, "seed": 0},
        **{"logging_steps": 1, "eval_batch_size": 1, "save_steps": 1, "save_total_limit": 1, "reuse_budget": 0},
    },
}


def check_recipe(recipe: Recipe) -> None:
    """Raise RecipeError for a value that training could not use, or would use without a word for something else."""
    for section, least in _LEAST.items():
        at_least(section, vars(getattr(recipe, section)), least)
    if recipe.train.label_smoothing >= 1:
        raise RecipeError(f"train.label_smoothing must be below 1, but is {recipe.train.label_smoothing!r}.")
    check_scheduler("train", recipe.train.lr_scheduler)
    if recipe.model.dtype != "auto":
        check_dtype("model.dtype", recipe.model.dtype)
    _check_place(recipe.train.output_dir)


def at_least(where: str, values: Mapping[str, Any], least: Mapping[str, float]) -> None:
    """Raise RecipeError for a number in `values` that is under its least, or is none: infinite, nan. None passes."""
    for key, bound in least.items():
        value = values.get(key)
        if value is not None and not (bound <= value < math.inf):
            said = f"at least {bound:g}" if bound in (0, 1, 2) else "above 0"
            said = said if math.isfinite(value) else "a finite number"
            raise RecipeError(f"{where}.{key} must be {said}, but is {value!r}.")


def check_scheduler(where: str, name: str) -> None:
    """Raise RecipeError unless transformers has such a schedule of the learning rate."""
    from transformers import SchedulerType

    known = [kind.value for kind in SchedulerType]
    if name not in known:
        raise RecipeError(f"{where}.lr_scheduler {name!r} is none of {', '.join(known)}.")


def check_dtype(key: str, name: str | None) -> None:
    """Raise RecipeError unless torch has such a dtype; None passes."""
    import torch

    if name is not None and not isinstance(getattr(torch, name, None), torch.dtype):
        raise RecipeError(f"{key} {name!r} is no dtype of torch, such as float32 or bfloat16.")


def _check_place(output_dir: str) -> None:
    path = Path(output_dir)
    if not output_dir or output_dir.startswith("~"):
        raise RecipeError(f"train.output_dir must be the whole path of a directory, but is {output_dir!r}.")
    there = next(place for place in (path, *path.absolute().parents) if place.exists())
    if not there.is_dir():
        raise RecipeError(f"train.output_dir {output_dir} cannot be made: {there} is a file.")
