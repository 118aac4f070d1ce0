"""`train(recipe)`: the base model, the data and `ReftTrainer`, put together as the recipe says.

    result = train(load_recipe("recipes/emoji.yaml"))

Writes into `output_dir`: the adapter with `recipe.yaml` (the recipe as it was resolved), and checkpoints with theirs if
asked for. What an earlier run left there is replaced with `overwrite` alone: its checkpoints when training begins, its
adapter when there is a new one; a run that does not get so far leaves it as it is.
"""

import dataclasses
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from reftune.data import PromptTemplate, ReftDataCollator, TokenizedRows, read_examples, tokenize
from reftune.models import disable_dropout, load_model
from reftune.train.precision import slow_bf16
from reftune.train.progress import ProgressCallback, first_step_table
from reftune.train.recipe import Recipe
from reftune.train.recipe_file import RecipeError, save_recipe
from reftune.train.resuming import RecipeBeside, all_done, check_rows, kept, remove_checkpoints, start_of, steps_done
from reftune.train.starting import StartByRows, check_start
from reftune.train.values import check_recipe


@dataclass(frozen=True)
class TrainResult:
    """What `train` made. size: bytes of the adapter's weights; loss: the mean training loss, or of a run
    that was resumed at its end the last one logged."""

    output_dir: Path
    size: int
    loss: float
    model: Any
    tokenizer: Any
    template: PromptTemplate


def train(
    recipe: Recipe, *, loaded: tuple[Any, Any] | None = None, say: Callable[[Any], None] | None = None
) -> TrainResult:
    """Train an adapter and save it.

    Args:
        recipe: what to train, see `load_recipe`.
        loaded: (model, tokenizer) to use for the recipe's model, if it is in memory already.
        say: takes what a user should see (text and rich's renderables); None prints it with rich.

    Raises:
        RecipeError: the recipe asks for what cannot be, such as no data, or `resume` of a run with another recipe;
            `output_dir` holds an earlier run's adapter or checkpoints, and neither `resume` nor `overwrite` is set.
    """
    from transformers import set_seed

    from reftune import get_reft_model
    from reftune.train.trainer import ReftTrainer

    say = say or printer()
    check_recipe(recipe)
    output_dir = Path(recipe.train.output_dir)
    checkpoint = start_of(recipe, say)
    if recipe.data.train is None:
        raise RecipeError("The recipe names no data: set data.train to a JSONL, CSV or Parquet file, or a hub id.")
    if recipe.train.head_lr is not None and not recipe.reft.modules_to_save:
        raise RecipeError("train.head_lr is the rate of reft.modules_to_save, which names none.")
    check_start(recipe)
    config = reft_config(recipe)  # before the slow steps: a wrong field is said at once

    base, tokenizer = loaded or load_model(recipe.model.name, dtype=recipe.model.dtype)
    template = PromptTemplate(tokenizer, recipe.data.template, recipe.data.system)
    rows = _rows(recipe, template, recipe.data.train, recipe.data.split)
    if checkpoint:
        check_rows(rows.rows, checkpoint)
    say(_counted(rows, recipe.data.train))
    eval_rows = _rows(recipe, template, recipe.data.eval, recipe.data.eval_split).rows if recipe.data.eval else None

    if recipe.train.disable_dropout:
        disable_dropout(base)
    set_seed(recipe.train.seed)
    model = get_reft_model(base, config)
    say(str(model.trainable_parameters()))
    say(first_step_table(model, tokenizer, rows.rows[0]))
    arguments = training_arguments(recipe)
    if arguments.bf16 and (hint := slow_bf16(arguments.device.type)):
        say(hint)
    trainer = ReftTrainer(
        model=model,
        args=arguments,
        train_dataset=rows.rows,
        eval_dataset=eval_rows,
        data_collator=ReftDataCollator(tokenizer),
        callbacks=[ProgressCallback(), RecipeBeside(recipe, rows.rows)],
        head_lr=recipe.train.head_lr,
        reuse=recipe.train.reuse,
        reuse_budget=recipe.train.reuse_budget,
        reuse_dir=recipe.train.reuse_dir,
        say=say,
    )
    if recipe.train.init_rows:
        trainer.add_callback(StartByRows(rows.rows[: recipe.train.init_rows], trainer, say))
    _quiet(trainer)
    if recipe.train.overwrite and trainer.is_world_process_zero():
        remove_checkpoints(output_dir)
    with _no_cache(base):
        if checkpoint and all_done(recipe, checkpoint):
            say(f"Its {recipe.train.max_steps or steps_done(checkpoint)} steps are done: nothing is left to train.")
            loss = _load(model, checkpoint)
        else:
            loss = trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None).training_loss
        _check_finite(model)
        save_recipe(kept(recipe), output_dir / "recipe.yaml")  # first: an adapter without it lacks its template
        trainer.save_model(str(output_dir))
    size = sum(path.stat().st_size for path in output_dir.glob("adapter_model.*"))
    model.eval()
    return TrainResult(output_dir, size, loss, model, tokenizer, template)


def reft_config(recipe: Recipe) -> Any:
    """The `ReftConfig` of a recipe."""
    from reftune import ReftConfig

    return ReftConfig(task_type="CAUSAL_LM", **dataclasses.asdict(recipe.reft))


def training_arguments(recipe: Recipe) -> Any:
    """The `transformers.TrainingArguments` of a recipe."""
    from transformers import TrainingArguments

    t = recipe.train
    evaluates = recipe.data.eval is not None
    return TrainingArguments(
        output_dir=t.output_dir,
        num_train_epochs=t.epochs,
        max_steps=t.max_steps if t.max_steps is not None else -1,
        per_device_train_batch_size=t.batch_size,
        per_device_eval_batch_size=t.eval_batch_size,
        gradient_accumulation_steps=t.gradient_accumulation_steps,
        learning_rate=t.lr,
        lr_scheduler_type=t.lr_scheduler,
        warmup_steps=t.warmup,
        weight_decay=t.weight_decay,
        max_grad_norm=t.max_grad_norm,
        label_smoothing_factor=t.label_smoothing,
        seed=t.seed,
        bf16=t.bf16,
        logging_steps=t.logging_steps,
        logging_first_step=True,
        save_strategy=t.save,
        save_steps=t.save_steps,
        save_total_limit=t.save_total_limit,
        eval_strategy="no" if not evaluates else ("steps" if t.save == "steps" else "epoch"),
        eval_steps=t.save_steps if evaluates and t.save == "steps" else None,
        disable_tqdm=True,
        remove_unused_columns=False,  # the rows have nothing else, and the collator adds prompt_mask
        report_to="none",
        dataloader_pin_memory=False,
        use_cpu=t.bf16 and not torch.accelerator.is_available(),  # bf16 on a CPU is refused unless it is named
        **_checkpointing(t.gradient_checkpointing),
    )


def _checkpointing(wanted: bool) -> dict[str, Any]:
    """Gradient checkpointing under the name that this transformers has for it; it was renamed during 5.x."""
    from transformers import TrainingArguments

    names = {field.name for field in dataclasses.fields(TrainingArguments)}
    name = "activation_checkpointing" if "activation_checkpointing" in names else "gradient_checkpointing"
    return {name: True} if wanted else {}


def size_words(size: int) -> str:
    """Bytes for people: 19.4 kB."""
    return f"{size / 1e3:.1f} kB" if size < 1e6 else f"{size / 1e6:.1f} MB"


def last_line(result: TrainResult) -> str:
    """Where the adapter is, its size, and how to chat with it."""
    where = result.output_dir
    return f"The adapter is in {where} ({size_words(result.size)}). Chat with it: reftune chat --adapter {where}"


def _rows(recipe: Recipe, template: PromptTemplate, source: str, split: str) -> TokenizedRows:
    examples = read_examples(source, split=split, limit=recipe.data.limit)
    return tokenize(examples, template, max_length=recipe.data.max_length, columns=recipe.data.columns)


def _counted(rows: TokenizedRows, source: str) -> str:
    words = [f"{len(rows.rows)} examples from {source}"]
    words += [f"{rows.truncated} responses cut"] if rows.truncated else []
    words += [f"{rows.skipped} left out"] if rows.skipped else []
    return ", ".join(words)


def _load(model: Any, checkpoint: Path) -> float:
    """Put a checkpoint's adapter into the model; returns the last loss that was logged."""
    from peft import load_peft_weights, set_peft_model_state_dict

    set_peft_model_state_dict(model, load_peft_weights(str(checkpoint), device="cpu"))
    logged = json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))["log_history"]
    return float(next((entry["loss"] for entry in reversed(logged) if "loss" in entry), float("nan")))


def printer() -> Callable[[Any], None]:
    """Prints text as it is, unwrapped, and rich's renderables."""
    from rich.console import Console

    console = Console()
    return lambda what: console.print(what, soft_wrap=isinstance(what, str), markup=False, highlight=False)


def _check_finite(model: Any) -> None:
    lost = [name for name, p in model.named_parameters() if p.requires_grad and not torch.isfinite(p).all()]
    if lost:
        raise ValueError(
            f"The training diverged, so the adapter was not saved: {len(lost)} of its tensors hold nan or infinity, "
            f"{lost[0]} among them. Lower train.lr, or set train.max_grad_norm."
        )


def _quiet(trainer: Any) -> None:
    """Without tqdm, Trainer prints each log as a dict; the progress callback shows them already."""
    from transformers import PrinterCallback

    trainer.remove_callback(PrinterCallback)


@contextmanager
def _no_cache(base: Any) -> Iterator[None]:
    """Training needs no cache; what the config said before holds again afterwards."""
    before, base.config.use_cache = base.config.use_cache, False
    try:
        yield
    finally:
        base.config.use_cache = before
