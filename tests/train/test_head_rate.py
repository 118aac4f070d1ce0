"""The head that is trained beside the edits has a rate of its own."""

from pathlib import Path
from typing import Any

import pytest
import torch
from test_reuse_trainer import arguments, model_for
from transformers import BertConfig, BertForSequenceClassification, Trainer

from reftune.train import HeadRate
from reftune.train.trainer import ReftTrainer

ROWS = [{"input_ids": [3 + i, 5, 7, 2 + i % 3], "labels": i % 2} for i in range(16)]


def collate(rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    return {key: torch.tensor([row[key] for row in rows]) for key in rows[0]}


def classifier() -> Any:
    torch.manual_seed(0)
    sizes: Any = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 4, "num_attention_heads": 2}
    config = BertConfig(vocab_size=40, **sizes)
    return model_for(
        BertForSequenceClassification(config), positions="all", task_type="SEQ_CLS", modules_to_save=["classifier"]
    )


def fit(cls: Any, directory: Path, model: Any = None, *, resume: bool = False, **more: Any) -> Any:
    settings = {key: more.pop(key) for key in list(more) if key not in ("head_lr", "optimizers")}
    settings = {"max_steps": 4, "learning_rate": 0.02, **settings}
    trainer = cls(
        model=classifier() if model is None else model,
        args=arguments(directory, **settings),
        train_dataset=ROWS,
        data_collator=collate,
        **more,
    )
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def parts(model: Any) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Copies of what is trained: the head, and the rest."""
    trained = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    head = {name: p for name, p in trained.items() if ".modules_to_save." in name}
    assert len(head) == 2
    return head, {name: p for name, p in trained.items() if name not in head}


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    assert a.keys() == b.keys()
    return all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_head_and_edits_move_at_their_own_rates(weight_decay: float, tmp_path: Path) -> None:
    head, edits = parts(classifier())
    still = fit(ReftTrainer, tmp_path, head_lr=0.0, weight_decay=weight_decay)
    assert same(parts(still.model)[0], head)
    assert not same(parts(still.model)[1], edits)
    moved = fit(ReftTrainer, tmp_path, head_lr=0.02, learning_rate=0.0, weight_decay=weight_decay)
    assert not same(parts(moved.model)[0], head)
    assert same(parts(moved.model)[1], edits)


def test_the_same_rate_is_a_plain_trainer_to_the_bit(tmp_path: Path) -> None:
    plain, apart = fit(Trainer, tmp_path), fit(ReftTrainer, tmp_path, head_lr=0.02)
    assert all(same(a, b) for a, b in zip(parts(plain.model), parts(apart.model), strict=True))


def test_both_rates_warm_up_and_decay_together(tmp_path: Path) -> None:
    trainer = fit(ReftTrainer, tmp_path, head_lr=0.002, max_steps=8, warmup_steps=2, lr_scheduler_type="cosine")
    trainer.create_optimizer_and_scheduler(8)
    starts = {group["initial_lr"] for group in trainer.optimizer.param_groups}
    assert starts == {0.02, 0.002}
    assert sum(len(group["params"]) for group in trainer.optimizer.param_groups) == len(
        {p for group in trainer.optimizer.param_groups for p in group["params"]}
    )
    for _ in range(6):
        trainer.optimizer.step()
        trainer.lr_scheduler.step()
        shares = {round(group["lr"] / group["initial_lr"], 12) for group in trainer.optimizer.param_groups}
        assert len(shares) == 1


def test_a_resumed_run_ends_in_the_same_bits(tmp_path: Path) -> None:
    options: dict[str, Any] = {"head_lr": 0.001, "save_strategy": "steps", "save_steps": 2}
    whole = fit(ReftTrainer, tmp_path / "run", **options)
    last = max((tmp_path / "run").glob("checkpoint-*"), key=lambda path: int(path.name.rsplit("-", 1)[1]))
    for file in sorted(last.glob("*")):
        file.unlink()
    last.rmdir()
    resumed = fit(ReftTrainer, tmp_path / "run", resume=True, **options)
    assert resumed.state.global_step == 4
    assert all(same(a, b) for a, b in zip(parts(whole.model), parts(resumed.model), strict=True))


def test_an_optimizer_that_was_given_is_left_alone(tmp_path: Path) -> None:
    model = classifier()
    given = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.02)
    trainer = fit(ReftTrainer, tmp_path, model, head_lr=0.5, optimizers=(given, None))
    assert [group["initial_lr"] for group in trainer.optimizer.param_groups] == [0.02]


def test_mistakes(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"head_lr is a learning rate, and must be 0 or above, but is -1\.0"):
        fit(ReftTrainer, tmp_path, head_lr=-1.0)

    class Own(HeadRate, Trainer):
        head_modules = ("score",)

    with pytest.raises(ValueError, match="none is trained: name some, or set no head_lr"):
        fit(Own, tmp_path, head_lr=0.1)
