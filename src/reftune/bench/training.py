"""The one trainer of all methods: transformers' Trainer with a fixed order of the rows, timed.

Only the loss of causal models is computed otherwise, on labelled tokens alone (see `logits`), for every method alike;
and what the frozen base makes unnecessary may be left out of a ReFT's steps (see `reftune.train.reuse`), which changes
rounding alone.
"""

import dataclasses
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import Trainer, TrainerCallback, TrainingArguments

from reftune.train.head_rate import HeadRate
from reftune.train.resuming import last_whole_checkpoint
from reftune.train.reuse import Store
from reftune.train.trainer import ReusesFrozenBase

from .grid import BudgetSection
from .logits import labelled_logits, takes_prompt_mask
from .order import ByLength


@dataclass(frozen=True)
class Fit:
    """What a training run was: its steps, mean loss, seconds in all (by the clock and of this process's CPU time, which
    a shared machine stretches less) and of a middling step, whether it was resumed, and what was reused, in words."""

    steps: int
    loss: float
    seconds: float
    cpu_seconds: float
    step_seconds: float
    resumed: bool
    reuse: str | None = None


class OrderedTrainer(HeadRate, Trainer):
    """Trainer whose order of the rows is the same for every method, grouped by length or not."""

    by_length = False  # not the argument of that name, which transformers 5.0 lacks, and which takes its own sampler

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        if not self.by_length:
            return super()._get_train_sampler(train_dataset)
        rows: Any = self.train_dataset if train_dataset is None else train_dataset
        size = self.args.train_batch_size * self.args.gradient_accumulation_steps
        return ByLength([len(row["input_ids"]) for row in rows], size, int(self.args.data_seed or 0))


class CausalTrainer(OrderedTrainer):
    """Trainer whose loss is the cross-entropy over labelled tokens."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.model_accepts_loss_kwargs = True  # tokens weigh alike in accumulated batches, whatever wraps the model

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Mean over the tokens of the batch, or their sum over `num_items_in_batch` if batches are accumulated."""
        logits, tokens, _ = labelled_logits(model, inputs)
        if num_items_in_batch is None:
            loss = nn.functional.cross_entropy(logits, tokens)
        else:
            loss = nn.functional.cross_entropy(logits, tokens, reduction="sum") / num_items_in_batch
        if getattr(model, "peft_type", None) == "ADALORA":
            loss = loss + _orthogonality(model)
        return (loss, {"logits": logits}) if return_outputs else loss


class ReusingTrainer(ReusesFrozenBase, CausalTrainer):
    """The same losses and gradients without what the frozen base makes unnecessary."""

    selects_logits = False  # the loss chooses its rows itself


def _orthogonality(model: Any) -> Any:
    """AdaLoRA's penalty on its factors, which PEFT adds only to a loss that the model computed itself."""
    weight = model.peft_config["default"].orth_reg_weight
    terms = []
    for name, factor in model.named_parameters():
        if ".lora_A." in name or ".lora_B." in name:
            gram = factor @ factor.T if ".lora_A." in name else factor.T @ factor
            terms.append(torch.linalg.norm(gram - torch.eye(len(gram), device=gram.device)))
    return weight * sum(terms) / len(terms)


class _Clock(TrainerCallback):
    def __init__(self) -> None:
        self.marks: list[float] = []

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.marks.append(time.perf_counter())


class _NotAtTheEnd(TrainerCallback):
    """No checkpoint after the last step: Trainer would go on from it with one step more."""

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step >= state.max_steps:
            control.should_save = False


class _Allocate(TrainerCallback):
    """AdaLoRA shares its ranks out anew after every optimiser step, while the gradients are still there."""

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        kwargs["model"].base_model.update_and_allocate(state.global_step + 1)


def fit(
    model: Any,
    rows: list[Any],
    collator: Any,
    budget: BudgetSection,
    *,
    lr: float,
    seed: int,
    head: list[str],
    work: Path,
    kept: Store | None = None,
    more_callbacks: Sequence[TrainerCallback] = (),
) -> Fit:
    """Train `model` in place.

    `head` names the modules of a classifier's head ([] for a causal model), which learn at the budget's `head_lr`.
    `work` holds checkpoints, if any are written; a run goes on from the last whole one. `kept` holds what a causal
    model's runs with ReFT share of the frozen base; None: nothing is reused.
    """
    adaptive = getattr(model, "peft_type", None) == "ADALORA"
    if adaptive:  # the ranks that it has pruned are of another shape than those it starts with: PEFT cannot go on
        budget = dataclasses.replace(budget, checkpoint_steps=None)
    arguments = training_arguments(budget, lr=lr, seed=seed, work=work)
    clock = _Clock()
    callbacks: list[TrainerCallback] = [clock, _NotAtTheEnd(), *more_callbacks]
    if adaptive:
        callbacks.append(_Allocate())
    trainer_class: Any = OrderedTrainer if head else CausalTrainer
    more: dict[str, Any] = {}
    if not head and kept is not None and takes_prompt_mask(model):
        trainer_class, more = ReusingTrainer, {"reuse": kept, "say": lambda text: None}
    trainer = trainer_class(
        model=model, args=arguments, train_dataset=rows, data_collator=collator, callbacks=callbacks, **more
    )
    trainer.head_lr, trainer.head_modules = budget.head_lr, head
    trainer.by_length = budget.train_sampling_strategy == "group_by_length"
    _quiet(trainer)
    checkpoint = last_whole_checkpoint(work) if budget.checkpoint_steps else None
    started, cpu = time.perf_counter(), time.process_time()
    outcome = trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    seconds, cpu = time.perf_counter() - started, time.process_time() - cpu
    gaps = sorted(b - a for a, b in zip(clock.marks, clock.marks[1:], strict=False))
    middle = gaps[len(gaps) // 2] if gaps else seconds / max(outcome.global_step, 1)
    model.eval()
    reuse = trainer.reuse_plan.splitlines()[0] if more and trainer.reuse.plan.anything else None
    return Fit(outcome.global_step, outcome.training_loss, seconds, cpu, middle, checkpoint is not None, reuse)


def training_arguments(budget: BudgetSection, *, lr: float, seed: int, work: Path) -> TrainingArguments:
    """The budget as transformers' arguments. data_seed keeps the order of rows apart from what a method draws."""
    arguments = TrainingArguments(
        output_dir=str(work),
        max_steps=budget.steps if budget.steps is not None else -1,
        num_train_epochs=budget.epochs,
        per_device_train_batch_size=budget.batch_size,
        gradient_accumulation_steps=budget.gradient_accumulation_steps,
        learning_rate=lr,
        lr_scheduler_type=budget.lr_scheduler,
        warmup_steps=budget.warmup,
        weight_decay=budget.weight_decay,
        max_grad_norm=budget.max_grad_norm,
        bf16=budget.bf16,
        seed=seed,
        data_seed=seed,
        logging_strategy="no",
        save_strategy="steps" if budget.checkpoint_steps else "no",
        save_steps=budget.checkpoint_steps or 500,
        save_total_limit=1,
        disable_tqdm=True,
        remove_unused_columns=False,
        report_to="none",
        dataloader_pin_memory=False,
        use_cpu=not torch.accelerator.is_available(),
    )
    if arguments.n_gpu > 1:
        arguments._n_gpu = 1  # a run is one device's; Trainer would spread its batches over all, changing their size
    return arguments


def total_steps(rows: int, budget: BudgetSection) -> int:
    """Optimiser steps that a run over so many rows takes, rounded up as by Trainer."""
    if budget.steps is not None:
        return budget.steps
    batches = -(-rows // budget.batch_size)
    return max(1, math.ceil(-(-batches // budget.gradient_accumulation_steps) * budget.epochs))


def _quiet(trainer: Any) -> None:
    from transformers import PrinterCallback

    trainer.remove_callback(PrinterCallback)
