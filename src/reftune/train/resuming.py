"""Where a run begins: at nothing, or at the last checkpoint of the same run; what an earlier run made is not replaced.

    checkpoint = start_of(recipe, say)                   # before anything is loaded; None: at nothing
    last_whole_checkpoint("runs/reft"), steps_done(checkpoint)

A process that is killed while it saves leaves a directory that Trainer would try, and fail, to resume from.
"""

import dataclasses
import functools
import hashlib
import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from reftune.train.recipe import Recipe
from reftune.train.recipe_file import RecipeError, load_recipe, save_recipe

_ROWS = "rows.sha256"
# what a run that goes on may do otherwise than the one before: it moves no number of a step
_FREE = {
    "data": {"eval", "eval_split"},
    "train": {
        *("output_dir", "epochs", "max_steps", "gradient_checkpointing", "logging_steps", "eval_batch_size", "save"),
        *("save_steps", "save_total_limit", "resume", "overwrite", "reuse", "reuse_budget", "reuse_dir"),
    },
}
_PATHS = {("model", "name"), ("data", "train")}


def start_of(recipe: Recipe, say: Callable[[Any], None]) -> Path | None:
    """The checkpoint to go on from, or None to begin at nothing.

    Raises RecipeError where that would replace or mix what an earlier run made: an adapter or checkpoints in
    `output_dir` without `resume` or `overwrite`, or checkpoints of another recipe.
    """
    output_dir = Path(recipe.train.output_dir)
    if recipe.train.resume and recipe.train.overwrite:
        raise RecipeError("train.resume goes on from a run and train.overwrite discards it: set one of them.")
    if recipe.train.overwrite:
        return None
    last = last_whole_checkpoint(output_dir)
    anew = "train.overwrite: true (--overwrite) to train anew in its place, or another train.output_dir (--output-dir)"
    if last and recipe.train.resume:
        if changes := _changes(recipe, last):
            raise RecipeError(
                f"The run in {output_dir} cannot be gone on with, for its recipe was another: {'; '.join(changes)}. "
                f"Set that back, or set {anew}. What only has another name or place now may be changed in "
                f"{last / 'recipe.yaml'} too."
            )
        say(f"Resuming from {last}")
        return last
    if last:
        raise RecipeError(
            f"{output_dir} holds checkpoints of an earlier run ({last.name}). Set train.resume: true (--resume) to go "
            f"on from there, {anew}."
        )
    if holds_adapter(output_dir):
        less = " and no checkpoint to resume from (train.save)" if recipe.train.resume else ""
        raise RecipeError(f"{output_dir} holds an adapter of an earlier run{less}. Set {anew}.")
    if recipe.train.resume:
        say(f"No checkpoint in {output_dir} to resume from: starting anew.")
    return None


def holds_adapter(directory: str | Path) -> bool:
    """Whether an adapter, of any method, was saved in the directory."""
    names = ("adapter_config.json", "adapter_model.safetensors", "adapter_model.bin")
    return any((Path(directory) / name).exists() for name in names)


def check_rows(rows: Sequence[Any], checkpoint: Path) -> None:
    """Raise RecipeError if the run behind a checkpoint had other training rows, under the same recipe."""
    digest = checkpoint / _ROWS
    if digest.is_file() and digest.read_text(encoding="utf-8").strip() != _digest(rows):
        raise RecipeError(
            f"The training data are not those of the run behind {checkpoint}: the file, or the model's tokenizer or "
            "chat template, has changed since. Put it back, set train.overwrite: true (--overwrite) to train anew, or "
            "another train.output_dir (--output-dir)."
        )


def remove_checkpoints(directory: str | Path) -> None:
    """Remove the checkpoints of an earlier run: a new one would be taken for older than they, and deleted first."""
    for path in Path(directory).glob("checkpoint-*"):
        if path.is_dir() and path.name.removeprefix("checkpoint-").isdigit():
            shutil.rmtree(path)


def kept(recipe: Recipe) -> Recipe:
    """The recipe as it is kept beside an adapter: whether to resume or to overwrite was said of one run only."""
    return dataclasses.replace(recipe, train=dataclasses.replace(recipe.train, resume=False, overwrite=False))


def last_whole_checkpoint(directory: str | Path) -> Path | None:
    """The checkpoint of the most steps whose `trainer_state.json`, which Trainer writes last, can be read."""
    found = {steps: path for path in Path(directory).glob("checkpoint-*") if (steps := steps_done(path)) is not None}
    return found[max(found)] if found else None


def steps_done(checkpoint: str | Path) -> int | None:
    """Optimiser steps behind a checkpoint; None if it is not whole."""
    try:
        return int(json.loads((Path(checkpoint) / "trainer_state.json").read_text(encoding="utf-8"))["global_step"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def all_done(recipe: Recipe, checkpoint: Path) -> bool:
    """Whether a checkpoint is the end of what the recipe asks for: Trainer, resumed there, may do a step more."""
    if recipe.train.max_steps is not None:
        planned = recipe.train.max_steps
    else:
        beside = checkpoint / "recipe.yaml"
        before = load_recipe(beside).train if beside.is_file() else recipe.train
        if before.max_steps is not None or before.epochs != recipe.train.epochs:
            return False
        planned = int(json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))["max_steps"])
    return (steps_done(checkpoint) or 0) >= planned


class RecipeBeside(TrainerCallback):
    """The recipe in every checkpoint: whoever talks to one needs its template and system message, and whoever goes on
    from one needs to know that the run is the same, its training rows too."""

    def __init__(self, recipe: Recipe, rows: Sequence[Any]) -> None:
        self.recipe, self.rows = recipe, rows

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        checkpoint = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        if state.is_world_process_zero and checkpoint.is_dir():
            (checkpoint / _ROWS).write_text(self._digest + "\n", encoding="utf-8")
            save_recipe(kept(self.recipe), checkpoint / "recipe.yaml")

    @functools.cached_property
    def _digest(self) -> str:  # once a run, not once a checkpoint
        return _digest(self.rows)


def _changes(recipe: Recipe, checkpoint: Path) -> list[str]:
    """What a recipe says otherwise than the one beside a checkpoint, of what decides which adapter comes of it."""
    path = checkpoint / "recipe.yaml"
    if not path.is_file():  # killed between the two
        return []
    before = load_recipe(path)
    found = []
    for section in dataclasses.fields(recipe):
        now, then = getattr(recipe, section.name), getattr(before, section.name)
        for item in dataclasses.fields(now):
            new, old = getattr(now, item.name), getattr(then, item.name)
            same = new == old or ((section.name, item.name) in _PATHS and _place(new) == _place(old))
            if not same and item.name not in _FREE.get(section.name, ()):
                found.append(f"{section.name}.{item.name} was {old!r} and is {new!r}")
    return found


def _place(name: Any) -> Any:
    """A path from wherever it is looked at; anything else as it stands."""
    return str(Path(name).resolve()) if name is not None and Path(name).exists() else name


def _digest(rows: Sequence[Any]) -> str:
    whole = hashlib.sha256()
    for row in rows:
        whole.update(json.dumps([row["input_ids"], row["labels"]]).encode())
    return whole.hexdigest()
