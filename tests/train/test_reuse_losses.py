"""Reuse under a loss that is not the model's own: it gets its rows as they are, or reuse is switched off."""

from pathlib import Path
from typing import Any

import pytest
import torch
from reuse_cases import GAPS, collate, examples
from test_reuse_trainer import arguments, history, model_for, run, same
from transformers import Trainer

from reftune.train.trainer import ReftTrainer, ReusesFrozenBase

pytestmark = GAPS


def crossed(outputs: Any, labels: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Cross-entropy at every place (B, L), 0 without a label; and whether there is one."""
    logits, targets = outputs.logits[:, :-1], labels[:, 1:]
    return torch.nn.functional.cross_entropy(logits.transpose(1, 2), targets, reduction="none"), targets != -100


def per_row(outputs: Any, labels: Any, num_items_in_batch: Any = None) -> torch.Tensor:
    lost, counted = crossed(outputs, labels)
    return (lost.sum(1) / counted.sum(1).clamp(min=1)).mean()


def per_column(outputs: Any, labels: Any, num_items_in_batch: Any = None) -> torch.Tensor:
    return crossed(outputs, labels)[0].mean()


def summed(outputs: Any, labels: Any, num_items_in_batch: Any = None) -> torch.Tensor:
    return crossed(outputs, labels)[0].sum() / num_items_in_batch


class PerRow(Trainer):
    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        outputs = model(**inputs)
        loss = per_row(outputs, inputs["labels"])
        return (loss, outputs) if return_outputs else loss


class ReusingPerRow(ReusesFrozenBase, PerRow):
    """Says nothing of its logits."""


@pytest.mark.parametrize("positions", ["l2", "f2+l2"])
def test_a_loss_of_rows_has_its_rows(tmp_path: Path, positions: str) -> None:
    settings = {"compute_loss_func": per_row, "eval_strategy": "epoch", "eval_dataset": examples(6, seed=9)}
    plain, _ = run(Trainer, model_for(positions=positions), tmp_path, **settings)
    reused, said = run(ReftTrainer, model_for(positions=positions), tmp_path, **settings)
    same(reused, plain)
    assert history(reused, "eval_loss") == pytest.approx(history(plain, "eval_loss"), rel=1e-6)
    assert len(said) == 1
    assert said[0].startswith("Reuse: the output of blocks")
    assert reused.reuse.store.found > 20


def test_a_trainer_that_computes_its_loss_itself_has_its_rows(tmp_path: Path) -> None:
    settings: dict[str, Any] = {"train_dataset": examples(12), "data_collator": collate}
    said: list[str] = []
    plain = PerRow(model=model_for(), args=arguments(tmp_path), **settings)
    reused = ReusingPerRow(model=model_for(), args=arguments(tmp_path), say=said.append, **settings)
    for trainer in (plain, reused):
        trainer.train()
    same(reused, plain)
    assert len(said) == 1
    assert "Not reused: logits, because the trainer has a loss of its own" in said[0]


def test_a_loss_of_columns_is_noticed(tmp_path: Path) -> None:
    """It divides by the width of the batch, which reuse makes smaller: nothing but itself can tell."""
    plain, _ = run(Trainer, model_for(), tmp_path, compute_loss_func=per_column)
    reused, said = run(ReftTrainer, model_for(), tmp_path, compute_loss_func=per_column)
    assert history(reused) == history(plain)
    assert len(said) == 1
    assert "switched off, because the loss of its first rows is" in said[0]


def test_a_loss_may_say_that_it_takes_any_logits(tmp_path: Path) -> None:
    class Narrow(ReftTrainer):
        selects_logits = True

    plain, _ = run(Trainer, model_for(), tmp_path, compute_loss_func=summed)
    reused, said = run(Narrow, model_for(), tmp_path, compute_loss_func=summed)
    same(reused, plain)
    assert said[0].startswith("Reuse: logits are computed at the labelled tokens alone")
    _, said = run(Narrow, model_for(), tmp_path, compute_loss_func=per_column)  # it is believed after a look
    assert "switched off" in said[0]
