"""Reuse follows the adapters that edit: of a mix, or the active ones."""

from pathlib import Path
from typing import Any

import pytest
import torch
from reuse_cases import FEWER, collate, computed, doubles, examples, reft, reuse, with_reuse
from test_reuse_trainer import arguments

from conftest import tiny_llama
from families import tiny
from reftune import ReftConfig, compose
from reftune.train.reuse import make_plan
from reftune.train.trainer import ReftTrainer


def two_adapters(base: Any) -> Any:
    """The active one edits late, at the end of the prompt; "b" edits early, at its start."""
    model = reft(base, "l2", layers=[3])
    model.add_adapter("b", ReftConfig(r=2, layers=[0], positions="f2", init_weights=False, task_type="CAUSAL_LM"))
    return model


def test_the_plan_is_of_the_mix() -> None:
    model = two_adapters(tiny("llama"))
    engine, _ = reuse(model)
    batch, mix = collate(examples()), compose({"default": 1.0, "b": 0.5})
    assert (engine.plan.depth, engine.plan.split) == (4 - FEWER, True)
    with doubles():
        with_reuse(engine, batch, True)
        with mix.on(model):
            assert (engine.plan.depth, engine.plan.split) == (1 - FEWER, False)
            assert "f2 edit the prompt from its start" in str(engine.plan)
            loss, gradients = computed(model, dict(batch))
            found = with_reuse(engine, batch, True)
            torch.testing.assert_close(found[0], loss, rtol=1e-10, atol=0)
            torch.testing.assert_close(found[1], gradients, rtol=1e-8, atol=1e-12)
    assert engine.plan.split
    compose({"b": 0.0}).apply(model)
    assert "no active ReFT adapter" in str(make_plan(model))


def test_rows_with_adapters_of_their_own_are_computed_whole(tmp_path: Path) -> None:
    model, names = two_adapters(tiny_llama(dtype=torch.float64)), ["default", "b", "b", "__base__"]
    losses = []
    for mode in ("off", "auto"):
        trainer = ReftTrainer(
            model=model, args=arguments(tmp_path, per_device_eval_batch_size=4), eval_dataset=examples(4), reuse=mode,
            data_collator=lambda rows: {**collate(rows), "adapter_names": names},
        )  # fmt: skip
        losses.append(trainer.evaluate()["eval_loss"])
    assert losses[1] == pytest.approx(losses[0], rel=1e-9)


def test_a_mix_applied_between_two_evaluations(tmp_path: Path) -> None:
    model, losses = two_adapters(tiny_llama(dtype=torch.float64)), []
    for mode in ("off", "auto"):
        said: list[str] = []
        trainer = ReftTrainer(
            model=model, args=arguments(tmp_path), data_collator=collate, eval_dataset=examples(8), reuse=mode,
            say=said.append,
        )  # fmt: skip
        alone = trainer.evaluate()["eval_loss"]
        compose({"default": 1.0, "b": 1.0}).apply(model)
        losses.append((alone, trainer.evaluate()["eval_loss"]))
        compose({}).remove(model)
    assert losses[1] == pytest.approx(losses[0], rel=1e-6)
    assert losses[0][0] != pytest.approx(losses[0][1], rel=1e-4)
    assert len(said) == 2


def test_another_adapter_under_the_same_name_between_two_evaluations(tmp_path: Path) -> None:
    losses = []
    for mode in ("off", "auto"):
        model = two_adapters(tiny_llama(dtype=torch.float64))
        trainer = ReftTrainer(
            model=model, args=arguments(tmp_path), data_collator=collate, eval_dataset=examples(8), reuse=mode,
            say=lambda _: None,
        )  # fmt: skip
        trainer.is_in_train = True  # as a callback would find it
        first = trainer.evaluate()["eval_loss"]
        model.delete_adapter("default")
        torch.manual_seed(2)
        early = ReftConfig(r=3, layers=[0], positions="f2", init_weights=False, task_type="CAUSAL_LM")
        model.add_adapter("default", early)
        model.set_adapter("default")
        losses.append((first, trainer.evaluate()["eval_loss"]))
    assert losses[1] == pytest.approx(losses[0], rel=1e-6)
    assert losses[0][0] != pytest.approx(losses[0][1], rel=1e-4)


def test_a_base_weight_that_is_unfrozen_between_two_steps_has_its_gradient() -> None:
    model = reft(tiny("llama"), "l2", layers=[3])
    engine, _ = reuse(model)
    batch = collate(examples())
    with doubles():
        with_reuse(engine, batch, True)
        model.get_base_model().model.layers[0].mlp.up_proj.weight.requires_grad_(True)
        _, gradients = computed(model, dict(batch))
        assert "up_proj.weight is trained too" in str(engine.plan)
        torch.testing.assert_close(with_reuse(engine, batch, True)[1], gradients, rtol=1e-8, atol=1e-12)


def test_a_base_that_left_no_trace_of_a_change_before_an_evaluation(tmp_path: Path) -> None:
    losses = []
    for mode in ("off", "memory"):
        model = two_adapters(tiny_llama(dtype=torch.float64))
        trainer = ReftTrainer(
            model=model, args=arguments(tmp_path), data_collator=collate, eval_dataset=examples(8), reuse=mode,
            say=lambda _: None,
        )  # fmt: skip
        first = trainer.evaluate()["eval_loss"]
        model.get_base_model().model.layers[0].mlp.up_proj.weight.data.mul_(3)
        losses.append((first, trainer.evaluate()["eval_loss"]))
    assert losses[1] == pytest.approx(losses[0], rel=1e-6)
    assert losses[0][0] != pytest.approx(losses[0][1], rel=1e-4)
