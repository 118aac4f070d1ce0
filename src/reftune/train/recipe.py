"""A recipe: everything `reftune train` needs, as dataclasses that a YAML file mirrors one-to-one.

    recipe = load_recipe("recipes/emoji.yaml", {"lr": "1e-3", "reft.layers": "all"})
    recipe.train.lr, recipe.reft.layers

A key is named by its section and name, `train.lr`; flags may leave the section out. See `recipes/` for commented files
and `recipe_file` for reading and writing.
"""

# ruff: noqa: RUF009  (`_key` is dataclasses.field with a help text)

from dataclasses import dataclass, field
from typing import Any, Literal


def _key(default: Any, help: str, flag: str | None = None) -> Any:
    meta = {"help": help, "flag": flag}
    if isinstance(default, dict | list):
        return field(default_factory=lambda: type(default)(default), metadata=meta)
    return field(default=default, metadata=meta)


@dataclass
class ModelSection:
    """The base model."""

    name: str = _key("smollm2-135m", "Hub id, directory, .gguf file, or smollm2-135m.", "model")
    dtype: str | None = _key(None, "float32, bfloat16, auto ...; null: float32 on a CPU, else auto.")


@dataclass
class DataSection:
    """The examples."""

    train: str | None = _key(None, "JSONL, CSV or Parquet file, hub id, or reftune:emoji.", "data")
    eval: str | None = _key(None, "The same, for an evaluation loss; null: none.", "eval-data")
    split: str = _key("train", "Split of a hub data set.")
    eval_split: str = _key("validation", "Split of a hub data set for the evaluation.")
    columns: dict[str, str] | None = _key(None, "Rename columns, e.g. {prompt: question, completion: answer}.")
    limit: int | None = _key(None, "Use the first so many examples, of the evaluation too; null: all.")
    max_length: int = _key(512, "Tokens of prompt and response together.")
    template: Literal["auto", "chat", "plain"] = _key("auto", "chat, plain, or auto: chat where the tokenizer has one.")
    system: str | None = _key(None, "System message put before every chat that has none.")


@dataclass
class ReftSection:
    """What is edited, and how: the fields of `ReftConfig`."""

    r: int = _key(4, "Rank of the intervention.")
    layers: str | int | list[int] = _key("mid", "mid, all, a number, a list, or a range such as 50%-70%.")
    positions: str = _key("f2+l2", "Tokens to edit: f2, l2, mid1, prompt, all, gen, gen:32, gen/64, joined by +.")
    component: str | list[str] = _key("block_output", "(block|attention|mlp)_(output|input), a path, or a list.")
    intervention: str = _key("loreft", "loreft, direft, nodireft, noreft, consreft, lobireft, red, postblock ...")
    share_weights: bool = _key(False, "One intervention per layer for all terms of positions.")
    act_fn: str | None = _key(None, "Function on the learned source: relu, silu ...; null: none.")
    dropout: float = _key(0.0, "Dropout on the edit.")
    bias: Literal["learned", "frozen", "none"] = _key("learned", "What becomes of b.")
    init_weights: bool = _key(True, "Start with an edit that is exactly zero.")
    intervention_kwargs: dict[str, Any] = _key({}, "Further arguments of the intervention.")
    modules_to_save: list[str] | None = _key(None, "Modules to train and save whole.")


@dataclass
class TrainSection:
    """How it is trained: most keys are transformers' TrainingArguments under shorter names."""

    output_dir: str = _key("runs/reft", "Where the adapter, the checkpoints and this recipe go.")
    epochs: float = _key(3.0, "Passes over the data.")
    max_steps: int | None = _key(None, "Optimiser steps; overrides epochs.")
    batch_size: int = _key(8, "Examples per forward pass on each device.")
    gradient_accumulation_steps: int = _key(1, "Forward passes per optimiser step.")
    lr: float = _key(9e-4, "Peak learning rate of AdamW.")
    head_lr: float | None = _key(None, "Peak learning rate of modules_to_save; null: lr.")
    lr_scheduler: str = _key("linear", "linear, cosine, constant, constant_with_warmup ...")
    warmup: float = _key(0.0, "Warm-up: below 1 a share of all steps, else a number of steps.")
    weight_decay: float = _key(0.0, "AdamW's weight decay.")
    max_grad_norm: float = _key(1.0, "Gradients are clipped to this norm.")
    disable_dropout: bool = _key(False, "Train without the base's own dropout.")
    label_smoothing: float = _key(0.0, "Label smoothing of the loss.")
    seed: int = _key(42, "Seed of the edit's start, of dropout and of the order of the examples.")
    init_rows: int = _key(0, "Examples by whose loss NodiReFT's reads start; docs/family.md. 0: at random.")
    bf16: bool = _key(False, "Autocast to bfloat16.")
    gradient_checkpointing: bool = _key(False, "Recompute activations in the backward pass to save memory.")
    logging_steps: int = _key(10, "Show the loss every so many steps.")
    eval_batch_size: int = _key(8, "Examples per forward pass in the evaluation.")
    save: Literal["no", "epoch", "steps"] = _key("no", "When to write checkpoints; the end result is always written.")
    save_steps: int = _key(500, "With save: steps, every so many; the evaluation keeps the same rhythm.")
    save_total_limit: int | None = _key(2, "Checkpoints to keep; null: all.")
    resume: bool = _key(False, "Go on from the last checkpoint in output_dir.")
    reuse: Literal["auto", "off", "memory", "disk"] = _key("auto", "Keep what the frozen base computes; docs/reuse.md.")
    reuse_budget: int | None = _key(None, "Bytes to keep at most; null: half of what is free, on a GPU a quarter.")
    reuse_dir: str | None = _key(None, "With reuse: disk, where; null: reuse in output_dir. May be shared by runs.")
    overwrite: bool = _key(False, "Train anew where output_dir holds an adapter or checkpoints; these go.")


@dataclass
class Recipe:
    """Everything `reftune train` needs."""

    model: ModelSection = field(default_factory=ModelSection)
    data: DataSection = field(default_factory=DataSection)
    reft: ReftSection = field(default_factory=ReftSection)
    train: TrainSection = field(default_factory=TrainSection)
