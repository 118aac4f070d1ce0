"""Nested ranks in a model: trained once, loaded or written at a lower rank."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from torch import Tensor

import reftune
from conftest import tiny_llama
from integration.tiny_training import losses, trainer
from reftune import ReftConfig, get_reft_model
from reftune.checkpoint.truncate import truncate
from reftune.interventions import orthonormality_error
from reftune.interventions.choice import Choice
from tiny_chat import save_tiny

IDS = torch.tensor([[5, 6, 7, 8, 9], [9, 8, 7, 6, 5]])


def model_with(**options: Any) -> PeftModel:
    settings = {"r": 4, "nested": True, "layers": [0, 1], "positions": "f1+l2", "task_type": "CAUSAL_LM"}
    torch.manual_seed(1)
    return get_reft_model(tiny_llama(layers=3), ReftConfig(**{**settings, **options}))


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        return model.eval()(IDS).logits


def saved(directory: Path, **options: Any) -> tuple[PeftModel, Path]:
    model = model_with(init_weights=False, **options)
    model.save_pretrained(directory / "full")
    return model, directory / "full"


def cut_by_hand(model: PeftModel, rank: int) -> Tensor:
    """Logits with all rows but the first ones set to where they add nothing: W = R, b = 0."""
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, reftune.LoreftIntervention):
                module.W[rank:] = module.R[rank:]
                module.b[rank:] = 0
    return logits(model)


# -- trained ----------------------------------------------------------------------------------------------------------


def test_with_the_plain_trainer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[int] = []
    real = Choice.rank
    monkeypatch.setattr(Choice, "rank", lambda self, ranks: drawn.append(real(self, ranks)) or drawn[-1])
    model = model_with()
    run = trainer(model, tmp_path, max_steps=15, learning_rate=0.3, weight_decay=0.3)
    run.train()
    run.save_model()
    passes = [drawn[i : i + 4] for i in range(0, len(drawn), 4)]  # two layers, two terms
    assert len(passes) == 15
    assert all(len(set(ranks)) == 1 for ranks in passes)
    assert len({ranks[0] for ranks in passes}) > 1
    rows = [v for k, v in load_file(tmp_path / "adapter_model.safetensors").items() if k.endswith(".R")]
    assert all(orthonormality_error(r) < 1e-5 for r in rows)
    with model.disable_adapter():
        assert torch.equal(logits(model), logits(tiny_llama(layers=3)))


def test_resumed_is_uninterrupted(tmp_path: Path) -> None:
    """The ranks drawn too."""
    options: dict[str, Any] = {"save_strategy": "steps", "save_steps": 3, "max_steps": 8, "weight_decay": 0.1}
    whole = trainer(model_with(), tmp_path / "whole", **options)
    whole.train()
    resumed = trainer(model_with(), tmp_path / "resumed", **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-3"))
    assert losses(resumed)[-5:] == losses(whole)[-5:]
    expected = dict(whole.model.named_parameters())
    assert all(torch.equal(value, expected[name]) for name, value in resumed.model.named_parameters())


def test_under_checkpointing_a_pass_is_recomputed_with_its_own_rank() -> None:
    def gradients(checkpointing: bool) -> dict[str, Tensor]:
        model = model_with(component="mlp_output", init_weights=False).train()
        if checkpointing:
            base = model.get_base_model()
            enable = getattr(base, "activation_checkpointing_enable", None) or base.gradient_checkpointing_enable
            enable({"use_reentrant": False})
        labels = IDS.clone()
        labels[:, :3] = -100
        torch.manual_seed(7)
        total = sum((k + 1) * model(IDS, labels=labels).loss for k in range(4))  # four passes, one backward
        total.backward()
        return {n: p.grad for n, p in model.named_parameters() if p.grad is not None}

    plain, recomputed = gradients(False), gradients(True)
    for name, value in plain.items():
        torch.testing.assert_close(recomputed[name], value, msg=name)


# -- loaded and written at a lower rank -------------------------------------------------------------------------------


@pytest.mark.parametrize("rank", [1, 2, 4])
def test_loaded_at_a_lower_rank_it_is_the_first_rows(tmp_path: Path, rank: int) -> None:
    model, directory = saved(tmp_path)
    config = ReftConfig.from_pretrained(str(directory), rank=rank)
    assert (config.r, config.nested) == (rank, True)
    small = PeftModel.from_pretrained(tiny_llama(layers=3), directory, config=config)
    expected = sum(p.numel() for n, p in model.named_parameters() if ".reft_" in n) * rank // 4
    assert sum(p.numel() for n, p in small.named_parameters() if ".reft_" in n) == expected
    torch.testing.assert_close(logits(small), cut_by_hand(model, rank), atol=1e-5, rtol=1e-5)
    small.save_pretrained(tmp_path / "again")
    again = PeftModel.from_pretrained(tiny_llama(layers=3), tmp_path / "again")
    assert torch.equal(logits(again), logits(small))


def test_written_at_a_lower_rank(tmp_path: Path) -> None:
    _, directory = saved(tmp_path, nested=[1, 2, 4])
    (directory / "recipe.yaml").write_text("data: {template: plain}")  # `reftune chat` asks as it says
    before = {file.name: file.read_bytes() for file in directory.iterdir()}
    truncate(directory, tmp_path / "small", rank=2)
    assert {file.name: file.read_bytes() for file in directory.iterdir()} == before
    config = json.loads((tmp_path / "small" / "adapter_config.json").read_text())
    assert (config["r"], config["nested"]) == (2, [1, 2])
    sizes = [(d / "adapter_model.safetensors").stat().st_size for d in (directory, tmp_path / "small")]
    tensors = load_file(tmp_path / "small" / "adapter_model.safetensors")
    assert sizes[1] < sizes[0] - sum(t.numel() * 4 for t in tensors.values()) + 500  # half the numbers are gone
    assert (tmp_path / "small" / "recipe.yaml").read_text() == "data: {template: plain}"
    assert "| Rank | 2 |" in (tmp_path / "small" / "README.md").read_text(encoding="utf-8")
    small = PeftModel.from_pretrained(tiny_llama(layers=3), tmp_path / "small")
    cut = ReftConfig.from_pretrained(str(directory), rank=2)
    other = PeftModel.from_pretrained(tiny_llama(layers=3), directory, config=cut)
    assert torch.equal(logits(small), logits(other))
    info = reftune.describe(tmp_path / "small")
    assert (info.rank, info.parameters) == ("2", sum(t.numel() for t in tensors.values()))


def test_load_adapted_at_a_lower_rank(tmp_path: Path) -> None:
    model, _ = reftune.load_model(str(save_tiny(tmp_path / "base")))
    adapted = get_reft_model(model, ReftConfig(r=4, nested=True, init_weights=False, task_type="CAUSAL_LM"))
    adapted.save_pretrained(tmp_path / "adapter")
    small, _ = reftune.load_adapted(str(tmp_path / "adapter"), rank=2)
    assert small.peft_config["default"].r == 2
    with pytest.raises(ValueError, match="between 1 and the adapter's own, 4, but is 5"):
        reftune.load_adapted(str(tmp_path / "adapter"), rank=5)


def test_rows_that_were_not_trained_to_stand_alone_are_warned_of(tmp_path: Path) -> None:
    _, directory = saved(tmp_path, nested=False)
    with pytest.warns(UserWarning, match=r"first 2 rows .* not trained to stand alone.*nested=True, or at this rank"):
        truncate(directory, tmp_path / "small", rank=2)
    _, directory = saved(tmp_path / "b", nested=[1, 4])
    with pytest.warns(UserWarning, match=r"Train with nested=\[1, 2, 4\]"):
        ReftConfig.from_pretrained(str(directory), rank=2)
    ReftConfig.from_pretrained(str(directory), rank=1)


@pytest.mark.parametrize(
    ("options", "rank", "message"),
    [
        ({}, 5, "between 1 and the adapter's own, 4, but is 5"),
        ({}, 0, "but is 0"),
        ({}, 2.0, "but is 2.0"),
        (
            {"nested": False, "intervention": "noreft"},
            2,
            "rows of a 'noreft' are in no order. Train it with nested=True",
        ),
        ({"nested": False, "intervention": "red"}, 1, "'red' has no rows"),
        ({"nested": False, "subspaces": {"a": 2, "b": 2}}, 2, "its rows belong to its tasks"),
        ({"nested": False, "stack": [1, 3]}, 2, "its rows belong to the stages"),
    ],
)
def test_what_cannot_be_cut(tmp_path: Path, options: dict, rank: Any, message: str) -> None:
    _, directory = saved(tmp_path, **options)
    with pytest.raises(ValueError, match=message):
        truncate(directory, tmp_path / "small", rank=rank)
    assert not (tmp_path / "small").exists()


def test_a_source_is_not_overwritten_and_must_be_there(tmp_path: Path) -> None:
    _, directory = saved(tmp_path)
    with pytest.raises(ValueError, match="would be overwritten by its own first rows"):
        truncate(directory, directory, rank=2)
    with pytest.raises(FileNotFoundError):
        truncate(tmp_path / "nowhere", tmp_path / "small", rank=2)


def test_noreft_trained_nested_can_be_cut(tmp_path: Path) -> None:
    _, directory = saved(tmp_path, intervention="noreft")
    truncate(directory, tmp_path / "small", rank=2)
    PeftModel.from_pretrained(tiny_llama(layers=3), tmp_path / "small")
