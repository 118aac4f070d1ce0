"""`train.init_rows`: NodiReFT starts by the loss of the first examples, when a run begins."""

from collections.abc import Callable, Sequence
from typing import Any

from transformers import TrainerCallback

from reftune.train.recipe import Recipe
from reftune.train.recipe_file import RecipeError


def check_start(recipe: Recipe) -> None:
    """Refuse `init_rows` that cannot be, before anything is loaded. Raises RecipeError."""
    rows, reft = recipe.train.init_rows, recipe.reft
    if rows < 0:
        raise RecipeError(f"train.init_rows must be a number of examples, such as 32, but is {rows}.")
    if rows and reft.intervention != "nodireft":
        raise RecipeError(f'train.init_rows is a start of reft.intervention "nodireft", not of {reft.intervention!r}.')
    if rows and not reft.init_weights:
        raise RecipeError("train.init_rows starts at an edit of zero, which reft.init_weights: false does not.")


class StartByRows(TrainerCallback):
    """Calls `initialize_reft_weights` before the first step of a new run, as this run takes its steps: under its
    autocast, with its gradient checkpointing. All processes see the same rows."""

    def __init__(self, rows: Sequence[Any], trainer: Any, say: Callable[[Any], None]) -> None:
        self.rows, self.trainer, self.say = rows, trainer, say

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        from reftune import initialize_reft_weights

        if state.global_step:  # it goes on from a checkpoint
            return
        trainer, size = self.trainer, args.per_device_train_batch_size
        if trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled:
            raise RecipeError("train.init_rows needs whole weights, and this run shards them: set it to 0.")
        parts = [self.rows[start : start + size] for start in range(0, len(self.rows), size)]
        with trainer.accelerator.autocast():
            initialize_reft_weights(
                trainer.accelerator.unwrap_model(trainer.model), list(map(trainer.data_collator, parts))
            )
        self.say(f"What is read starts from the loss of {len(self.rows)} examples.")
