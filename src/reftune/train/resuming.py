"""Checkpoints to go on from: the last that was written to its end, its steps, and the recipe that each is given.

    checkpoint = last_whole_checkpoint("runs/reft")      # None if there is none
    steps_done(checkpoint)

A process that is killed while it saves leaves a directory that Trainer would try, and fail, to resume from.
"""

import json
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from reftune.train.recipe import Recipe
from reftune.train.recipe_file import save_recipe


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


class RecipeBeside(TrainerCallback):
    """The recipe in every checkpoint: whoever talks to one needs its template and system message."""

    def __init__(self, recipe: Recipe) -> None:
        self.recipe = recipe

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        checkpoint = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        if state.is_world_process_zero and checkpoint.is_dir():
            save_recipe(self.recipe, checkpoint / "recipe.yaml")
