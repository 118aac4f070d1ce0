"""Subspaces in a model: each batch row its own tasks, in forward, generate and a Trainer; frozen tasks bit for bit."""

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import PeftModel
from safetensors.torch import load_file
from torch import Tensor

from conftest import tiny_llama
from integration.tiny_training import Rows, collate, losses, trainer
from reftune import ReftConfig, get_reft_model
from reftune.interventions import SubspaceIntervention, orthonormality_error

IDS = torch.tensor([[5, 6, 7, 8, 9], [9, 8, 7, 6, 5], [11, 12, 13, 14, 15], [21, 22, 23, 24, 25]])


def model_with(dtype: torch.dtype = torch.float32, **options: Any) -> PeftModel:
    settings = {"r": 3, "subspaces": {"a": 1, "b": 2}, "layers": [1, 2], "positions": "f1+l2", "task_type": "CAUSAL_LM"}
    torch.manual_seed(1)
    return get_reft_model(tiny_llama(dtype=dtype), ReftConfig(**{**settings, **options}))


def parts(model: PeftModel) -> list[SubspaceIntervention]:
    return [module for module in model.modules() if isinstance(module, SubspaceIntervention)]


def state(model: PeftModel, task: str) -> dict[str, Tensor]:
    return {n: p.detach().clone() for n, p in model.named_parameters() if f".subspace_{task}." in n}


def whole_rows(tensors: dict[str, Tensor]) -> list[Tensor]:
    """R of each intervention of a saved adapter, all tasks together."""
    found: dict[str, list[Tensor]] = {}
    for name, value in tensors.items():
        if name.endswith(".R"):
            found.setdefault(name.partition(".subspace_")[0], []).append(value)
    return [torch.cat(rows) for rows in found.values()]


def logits(model: Any, **options: Any) -> Tensor:
    with torch.no_grad():
        return model.eval()(IDS, **options).logits


def by_task(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """A collator that says which task each row belongs to: even first tokens are a's."""
    return {**collate(rows), "subspaces": ["ab"[row["input_ids"][0] % 2] for row in rows]}


# -- chosen -----------------------------------------------------------------------------------------------------------


@settings(max_examples=12, deadline=None, derandomize=True)
@given(entries=st.lists(st.sampled_from(["a", "b", "a+b", "__base__", None]), min_size=4, max_size=4))
def test_a_mixed_batch_equals_each_row_alone(entries: list[str | None]) -> None:
    model = model_with(torch.float64, init_weights=False)
    mixed = logits(model, subspaces=entries)
    for row, entry in enumerate(entries):
        with torch.no_grad():
            alone = model(IDS[row : row + 1], subspaces=[entry]).logits[0]
        torch.testing.assert_close(mixed[row], alone, atol=1e-6, rtol=1e-6)
    with model.disable_adapter():
        base = logits(model)
    for row, entry in enumerate(entries):
        assert torch.allclose(mixed[row], base[row], atol=1e-9) == (entry == "__base__")


def test_a_choice_for_the_whole_model_and_for_a_call() -> None:
    model = model_with(init_weights=False)
    together = logits(model)
    model.set_subspaces("a")
    alone = logits(model)
    assert not torch.allclose(alone, together)
    torch.testing.assert_close(logits(model, subspaces=["a"] * 4), alone)
    torch.testing.assert_close(logits(model, subspaces="a+b"), together)  # a call's choice goes before the model's
    model.set_subspaces(None)
    assert torch.equal(logits(model), together)


def test_generation_takes_a_choice_by_row() -> None:
    model = model_with(init_weights=False, positions="all").eval()
    options: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    mixed = model.generate(IDS[:3], subspaces=["a", "b", "__base__"], **options)
    for row, entry in enumerate(["a", "b", "__base__"]):
        assert torch.equal(mixed[row], model.generate(IDS[row : row + 1], subspaces=[entry], **options)[0])
    assert torch.equal(model.generate(IDS[:2], subspaces="a", **options)[0], mixed[0])
    beams = model.generate(IDS[:2], subspaces=["a", "b"], num_beams=2, **options)
    assert torch.equal(beams[1], model.generate(IDS[1:2], subspaces=["b"], num_beams=2, **options)[0])


@pytest.mark.parametrize(
    ("choice", "message"),
    [
        (["c"] * 4, "There is no subspace 'c'. The active adapters have a, b"),
        (["a", "b", "a"], "subspaces has 3 entries, but the batch has 4 rows"),
        (7, "subspaces must be a name such as"),
    ],
)
def test_choices_that_cannot_be_meant(choice: Any, message: str) -> None:
    model = model_with()
    with pytest.raises(ValueError, match=message):
        model.eval()(IDS, subspaces=choice)
    logits(model)  # and nothing is left behind


# -- trained ----------------------------------------------------------------------------------------------------------


def test_each_task_is_trained_on_its_own_rows(tmp_path: Path) -> None:
    model = model_with()
    base = logits(model)
    run = trainer(model, tmp_path, data_collator=by_task, remove_unused_columns=False, max_steps=20, learning_rate=0.1)
    run.train()
    assert losses(run)[-1] < losses(run)[0]
    choices = [logits(model, subspaces=s) for s in ("a", "b", "a+b")]
    assert len({tuple(t.flatten().tolist()) for t in [base, *choices]}) == 4
    with model.disable_adapter():
        assert torch.equal(logits(model), base)  # bit for bit


@pytest.mark.parametrize("kind", ["loreft", "direft", "lobireft", "consreft"])
def test_rows_are_orthonormal_as_a_whole_after_hard_training(tmp_path: Path, kind: str) -> None:
    model = model_with(intervention=kind, init_weights=False)
    run = trainer(
        model,
        tmp_path,
        data_collator=by_task,
        remove_unused_columns=False,
        max_steps=12,
        learning_rate=0.5,
        weight_decay=0.3,
    )
    run.train()
    run.save_model()
    rows = whole_rows(load_file(tmp_path / "adapter_model.safetensors"))
    assert len(rows) == 4
    assert all(orthonormality_error(r) < 1e-5 for r in rows)


def test_one_task_after_the_other(tmp_path: Path) -> None:
    """b is trained on what a is: a stays bit for bit, under weight decay, whether frozen or only absent."""
    model = model_with()
    model.train_only(subspaces="a")
    trainer(model, tmp_path, max_steps=6, learning_rate=0.1).train()
    only_a = logits(model, subspaces="a")
    a, b = state(model, "a"), state(model, "b")
    model.train_only(subspaces=["b"])
    with model.disable_adapter():  # PEFT makes the adapter trainable again after it: the choice must hold
        logits(model)
    run = trainer(model, tmp_path, max_steps=10, learning_rate=0.3, weight_decay=0.1)
    run.train()
    assert torch.equal(logits(model, subspaces="a"), only_a)
    assert all(torch.equal(value, a[name]) for name, value in state(model, "a").items())
    assert all(not torch.equal(value, b[name]) for name, value in state(model, "b").items())
    run.save_model()
    assert all(
        orthonormality_error(rows) < 1e-5 for rows in whole_rows(load_file(tmp_path / "adapter_model.safetensors"))
    )
    model.train_only()
    assert all(p.requires_grad for n, p in model.named_parameters() if ".reft_" in n)

    model.set_subspaces("b")  # nothing frozen: passes that a takes no part in
    a = state(model, "a")
    trainer(model, tmp_path, max_steps=5, learning_rate=0.3, weight_decay=0.1).train()
    logits(model)
    assert all(torch.equal(value, a[name]) for name, value in state(model, "a").items())


def test_resumed_is_uninterrupted(tmp_path: Path) -> None:
    options: dict[str, Any] = {
        "save_strategy": "steps",
        "save_steps": 3,
        "max_steps": 7,
        "weight_decay": 0.1,
        "learning_rate": 0.1,
        "data_collator": by_task,
        "remove_unused_columns": False,
    }
    whole = trainer(model_with(), tmp_path / "whole", **options)
    whole.train()
    resumed = trainer(model_with(), tmp_path / "resumed", **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-3"))
    assert losses(resumed)[-4:] == losses(whole)[-4:]
    for task in "ab":
        expected = state(whole.model, task)
        assert all(torch.equal(value, expected[name]) for name, value in state(resumed.model, task).items())


def test_under_gradient_checkpointing_each_row_keeps_its_task() -> None:
    """Two forwards before one backward, recomputed inside the block: each with its own choice."""

    def gradients(checkpointing: bool) -> dict[str, Tensor]:
        model = model_with(component="mlp_output", init_weights=False).train()
        if checkpointing:
            base = model.get_base_model()
            enable = getattr(base, "activation_checkpointing_enable", None) or base.gradient_checkpointing_enable
            enable({"use_reentrant": False})
        labels = IDS.clone()
        labels[:, :3] = -100
        first = model(IDS, labels=labels, subspaces=["a", "b", "a", "b"]).loss
        second = model(IDS, labels=labels, subspaces=["b"] * 4).loss
        (first + 2 * second).backward()
        return {n: p.grad for n, p in model.named_parameters() if p.grad is not None}

    plain, recomputed = gradients(False), gradients(True)
    assert plain.keys() == recomputed.keys()
    for name, value in plain.items():
        torch.testing.assert_close(recomputed[name], value, msg=name)


# -- saved and loaded -------------------------------------------------------------------------------------------------


def test_saved_equals_loaded_under_any_name(tmp_path: Path) -> None:
    """Also beside an adapter that has the name of a task."""
    model = model_with(init_weights=False)
    model.save_pretrained(tmp_path)
    keys = load_file(tmp_path / "adapter_model.safetensors")
    assert "base_model.model.model.layers.1.edit_output.reft_f1.subspace_a.R" in keys
    loaded = PeftModel.from_pretrained(tiny_llama(), tmp_path, adapter_name="a")
    loaded.load_adapter(tmp_path, "c")
    for name in ("a", "c"):
        loaded.set_adapter(name)
        for choice in (None, "a", "b"):
            assert torch.equal(logits(loaded, subspaces=choice), logits(model, subspaces=choice))
    loaded.save_pretrained(tmp_path / "again")
    again = load_file(tmp_path / "again" / "c" / "adapter_model.safetensors")
    assert again.keys() == keys.keys()
    assert all(torch.equal(value, keys[name]) for name, value in again.items())


def test_a_module_given_is_divided_too() -> None:
    module = SubspaceIntervention(32, {"x": 1, "y": 2}, "direft", init_weights=False)
    config = ReftConfig(intervention=module, layers=[1])
    assert (config.intervention, config.r, config.subspaces) == ("direft", 3, {"x": 1, "y": 2})
    model = get_reft_model(tiny_llama(), config)
    assert all(torch.equal(part.parts["x"].R, module.parts["x"].R) for part in parts(model))
    tied = get_reft_model(tiny_llama(), ReftConfig(representations={"layer": 1, "intervention": module}))
    assert len(parts(tied)) == 1


def test_an_adapter_without_subspaces_says_so() -> None:
    model = get_reft_model(tiny_llama(), ReftConfig(r=2))
    with pytest.raises(ValueError, match="Adapter 'default' has no subspaces"):
        model.set_subspaces("a")
    with pytest.raises(ValueError, match="Adapter 'default' has no subspaces"):
        model.train_only(subspaces="a")
    with pytest.raises(ValueError, match="There is no adapter 'other'"):
        model.train_only(subspaces="a", adapter_name="other")
    with pytest.raises(ValueError, match="subspaces or stage, not both"):
        model.train_only(subspaces="a", stage=1)
    with pytest.raises(ValueError, match="No active adapter has subspaces"):
        model.eval()(IDS, subspaces="a")


def test_rows_of_the_data_set_reach_the_model(tmp_path: Path) -> None:
    """Rows() has both tasks, or the tests above would say nothing."""
    assert {"ab"[row["input_ids"][0] % 2] for row in Rows().rows} == {"a", "b"}
