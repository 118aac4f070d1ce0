"""A stack in a model: trained together or stage by stage with a plain Trainer, saved as one adapter."""

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from torch import Tensor

from conftest import tiny_llama
from integration.tiny_training import losses, trainer
from reftune import ReftConfig, get_reft_model
from reftune.interventions import StackIntervention, orthonormality_error

IDS = torch.tensor([[5, 6, 7, 8, 9], [9, 8, 7, 6, 5]])


def model_with(**options: Any) -> PeftModel:
    settings = {"stack": [1, 2, 4], "between": "gelu", "layers": [1, 2], "positions": "f1+l2", "task_type": "CAUSAL_LM"}
    torch.manual_seed(1)
    return get_reft_model(tiny_llama(), ReftConfig(**{**settings, **options}))


def logits(model: Any, **options: Any) -> Tensor:
    with torch.no_grad():
        return model.eval()(IDS, **options).logits


def stage(model: PeftModel, number: int) -> dict[str, Tensor]:
    return {n: p.detach().clone() for n, p in model.named_parameters() if f".stage_{number}." in n}


def test_the_start_is_the_base() -> None:
    assert torch.equal(logits(model_with()), logits(tiny_llama()))


def test_together(tmp_path: Path) -> None:
    model = model_with()
    run = trainer(model, tmp_path, max_steps=15, learning_rate=0.3, weight_decay=0.3)
    run.train()
    run.save_model()
    rows = [value for name, value in load_file(tmp_path / "adapter_model.safetensors").items() if name.endswith(".R")]
    assert sorted({len(r) for r in rows}) == [1, 2, 4]
    assert len(rows) == 12
    assert all(orthonormality_error(r) < 1e-5 for r in rows)
    with model.disable_adapter():
        assert torch.equal(logits(model), logits(tiny_llama()))


def test_one_stage_after_the_other(tmp_path: Path) -> None:
    model = model_with()
    for number in range(3):
        model.train_only(stage=number)
        logits(model)
        before = [stage(model, other) for other in range(3)]
        trainer(model, tmp_path, max_steps=4, learning_rate=0.1, weight_decay=0.1).train()
        for other in range(3):
            same = all(torch.equal(value, before[other][name]) for name, value in stage(model, other).items())
            assert same == (other != number)
    model.train_only()
    assert all(p.requires_grad for n, p in model.named_parameters() if ".reft_" in n)
    with pytest.raises(ValueError, match="no stage 3: this stack has 3"):
        model.train_only(stage=3)
    with pytest.raises(ValueError, match="Adapter 'default' has no subspaces"):
        model.train_only(subspaces="a")


@pytest.mark.parametrize("between", [None, "tanh"])
def test_saved_equals_loaded(tmp_path: Path, between: str | None) -> None:
    model = model_with(between=between, init_weights=False)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny_llama(), tmp_path, adapter_name="other")
    assert torch.equal(logits(loaded), logits(model))
    assert loaded.peft_config["other"].stack == [1, 2, 4]
    [first, *_] = [m for m in loaded.modules() if isinstance(m, StackIntervention)]
    assert (first.ranks, first.between) == ((1, 2, 4), between)


def test_resumed_is_uninterrupted(tmp_path: Path) -> None:
    options: dict[str, Any] = {"save_strategy": "steps", "save_steps": 3, "max_steps": 7, "weight_decay": 0.1}
    whole = trainer(model_with(), tmp_path / "whole", **options)
    whole.train()
    resumed = trainer(model_with(), tmp_path / "resumed", **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-3"))
    assert losses(resumed)[-4:] == losses(whole)[-4:]
    for number in range(3):
        expected = stage(whole.model, number)
        assert all(torch.equal(value, expected[name]) for name, value in stage(resumed.model, number).items())


def test_it_generates_and_mixes_with_others_by_row() -> None:
    model = model_with(init_weights=False).eval()
    model.add_adapter("plain", ReftConfig(r=2, init_weights=False))
    options: dict[str, Any] = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    mixed = model.generate(IDS, adapter_names=["default", "plain"], **options)
    assert torch.equal(mixed[0], model.generate(IDS[:1], **options)[0])


def test_representations_may_hold_stacks() -> None:
    config = ReftConfig(representations=[{"layer": 0, "stack": [1, 2]}, {"layer": 1, "r": 3}])
    assert [edit["r"] for edit in config.edits()] == [3, 3]
    model = get_reft_model(tiny_llama(), config)
    assert sum(isinstance(m, StackIntervention) for m in model.modules()) == 1
