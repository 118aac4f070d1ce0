"""Values of a recipe that no training could use are refused before a model is loaded, and leave what is there alone."""

import json
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file
from tests.tiny_chat import save_tiny

import reftune.train.run
from reftune.train import RecipeError, load_recipe, train


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("model.dtype", "bf16", "is no dtype of torch"),
        ("gradient_accumulation_steps", 0, "must be at least 1, but is 0"),
        ("max_steps", 0, "train.max_steps must be at least 1"),
        ("epochs", -1.0, "train.epochs must be above 0, but is -1.0"),
        ("lr", float("inf"), "train.lr must be a finite number, but is inf"),
        ("lr", float("nan"), "but is nan"),
        ("label_smoothing", 2.0, "train.label_smoothing must be below 1"),
        ("weight_decay", -1.0, "train.weight_decay must be at least 0"),
        ("save_steps", 0, "train.save_steps must be at least 1"),
        ("limit", 0, "data.limit must be at least 1"),
        ("batch_size", 0, "train.batch_size must be at least 1"),
        ("lr_scheduler", "linaer", "train.lr_scheduler 'linaer' is none of"),
        ("output_dir", "", "must be the whole path of a directory"),
        ("output_dir", "~/adapter", "must be the whole path of a directory"),
    ],
)
def test_a_value_that_cannot_be_is_said_before_a_model_is_loaded(
    key: str, value: Any, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reftune.train.run, "load_model", lambda *args, **kwargs: pytest.fail("loaded"))
    with pytest.raises(RecipeError, match=said):
        train(load_recipe(None, {"data.train": "nothing.jsonl", key: value}))


def test_an_output_directory_below_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("text")
    with pytest.raises(RecipeError, match="file is a file"):
        train(load_recipe(None, {"data.train": "nothing.jsonl", "output_dir": str(tmp_path / "file" / "out")}))


@pytest.fixture
def keys(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "hf")
    (tmp_path / "data.jsonl").write_text(json.dumps({"prompt": "1+1", "completion": "2"}) + "\n")
    return {
        "model.name": str(save_tiny(tmp_path / "base")),
        "data.train": str(tmp_path / "data.jsonl"),
        "output_dir": str(tmp_path / "out"),
        "max_steps": 2,
    }


def test_a_run_that_fails_leaves_an_earlier_adapter_and_its_recipe(keys: dict[str, Any], tmp_path: Path) -> None:
    out = tmp_path / "out"
    train(load_recipe(None, keys | {"system": "Be brief."}), say=lambda _: None)
    before = load_file(out / "adapter_model.safetensors")
    with pytest.raises(ValueError, match=r"diverged.*Lower train\.lr"):
        train(load_recipe(None, keys | {"lr": 1e38, "r": 2, "overwrite": True}), say=lambda _: None)
    assert load_recipe(out / "recipe.yaml") == load_recipe(None, keys | {"system": "Be brief."})
    after = load_file(out / "adapter_model.safetensors")
    assert all((tensor == after[name]).all() for name, tensor in before.items())


def test_a_checkpoint_has_the_recipe_that_its_template_is_read_from(keys: dict[str, Any], tmp_path: Path) -> None:
    keys |= {"save": "steps", "save_steps": 1, "save_total_limit": 1, "system": "Be brief."}
    train(load_recipe(None, keys), say=lambda _: None)
    (checkpoint,) = (tmp_path / "out").glob("checkpoint-*")
    assert load_recipe(checkpoint / "recipe.yaml").data.system == "Be brief."
