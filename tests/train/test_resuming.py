"""What an earlier run made is not replaced without a word, and a run goes on only as the run that it was."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tests.train.conftest import write_sums

from reftune.cli.demo import demo
from reftune.train import RecipeError, load_recipe, train
from reftune.train.resuming import last_whole_checkpoint


@pytest.fixture
def keys(base_keys: dict[str, Any]) -> dict[str, Any]:
    return base_keys | {"max_steps": 4}


def _weights(directory: Path) -> dict[str, torch.Tensor]:
    return load_file(directory / "adapter_model.safetensors")


def _quietly(keys: dict[str, Any]) -> Any:
    return train(load_recipe(None, keys), say=lambda _: None)


def _same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(tensor, other[name]) for name, tensor in one.items())


def test_a_finished_adapter_is_replaced_only_where_that_is_said(keys: dict[str, Any], tmp_path: Path) -> None:
    first = _weights(_quietly(keys).output_dir)
    other = keys | {"train.seed": 7, "model.name": "nowhere"}  # refused before a model is looked for
    with pytest.raises(RecipeError, match=r"out holds an adapter of an earlier run\. Set .*overwrite.*output_dir"):
        _quietly(other)
    with pytest.raises(RecipeError, match="holds an adapter of an earlier run and no checkpoint to resume from"):
        _quietly(other | {"resume": True})
    assert _same(first, _weights(tmp_path / "out"))
    _quietly(keys | {"train.seed": 7, "overwrite": True})
    assert not _same(first, _weights(tmp_path / "out"))
    with pytest.raises(RecipeError, match="holds an adapter"):  # what is kept does not say overwrite
        train(load_recipe(tmp_path / "out" / "recipe.yaml"), say=lambda _: None)


def test_the_demo_replaces_a_demo_and_nothing_else(keys: dict[str, Any], tmp_path: Path) -> None:
    _quietly(keys)
    with pytest.raises(RecipeError, match="holds an adapter of an earlier run"):
        demo(str(tmp_path / "out"), model="nowhere")
    _quietly(keys | {"data.train": "reftune:emoji", "overwrite": True})
    with pytest.raises(OSError, match="nowhere"):
        demo(str(tmp_path / "out"), model="nowhere")


def test_checkpoints_of_a_run_that_was_overwritten_are_gone(keys: dict[str, Any], tmp_path: Path) -> None:
    """A rotation by number deletes the new run's first, and a resumed run had gone on from the old one's last."""
    _quietly(keys | {"save": "steps", "save_steps": 3, "max_steps": 6})
    new = keys | {"save": "steps", "save_steps": 1, "lr": 2e-2}
    _quietly(new | {"overwrite": True})
    whole = _weights(tmp_path / "out")
    assert sorted(path.name for path in (tmp_path / "out").glob("checkpoint-*")) == ["checkpoint-3", "checkpoint-4"]
    (tmp_path / "out" / "checkpoint-4").rename(tmp_path / "gone")
    _quietly(new | {"resume": True})
    assert _same(whole, _weights(tmp_path / "out"))


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"r": 3}, "reft.r was 2 and is 3"),
        ({"layers": "all"}, "reft.layers was 'mid' and is 'all'"),
        ({"lr": 1e-3, "batch_size": 3}, "train.batch_size was 2 and is 3; train.lr was 0.01 and is 0.001"),
        ({"seed": 1}, "train.seed was 42 and is 1"),
        ({"data.train": "reftune:emoji"}, "is 'reftune:emoji'"),
    ],
)
def test_a_run_goes_on_with_its_own_recipe_alone(keys: dict[str, Any], change: dict[str, Any], told: str) -> None:
    _quietly(keys | {"save": "steps", "save_steps": 2, "max_steps": 2})
    with pytest.raises(RecipeError, match="cannot be gone on with, for its recipe was another") as error:
        _quietly(keys | {"save": "steps", "resume": True, "model.name": keys["model.name"] + "/."} | change)
    assert told in str(error.value)
    assert "model.name" not in str(error.value)


def test_longer_or_with_other_reports_it_goes_on(
    keys: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    keys |= {"save": "steps", "save_steps": 2, "lr_scheduler": "constant"}
    whole = _weights(_quietly(keys).output_dir)
    short = keys | {"output_dir": str(tmp_path / "short")}
    _quietly(short | {"max_steps": 2})
    monkeypatch.chdir(tmp_path)
    said: list[Any] = []
    more = {"resume": True, "logging_steps": 1, "data.train": "data.jsonl", "data.eval": "data.jsonl"}
    train(load_recipe(None, short | more), say=said.append)
    assert said[0].endswith("checkpoint-2")
    assert _same(whole, _weights(tmp_path / "short"))


def test_rows_that_changed_in_their_file_are_noticed(keys: dict[str, Any], tmp_path: Path) -> None:
    keys |= {"save": "steps", "save_steps": 2}
    _quietly(keys | {"max_steps": 2})
    checkpoint = last_whole_checkpoint(tmp_path / "out")
    assert checkpoint is not None
    write_sums(tmp_path / "data.jsonl", 3)
    with pytest.raises(RecipeError, match=r"training data are not those of the run behind .*checkpoint-2: the file"):
        _quietly(keys | {"resume": True})
    write_sums(tmp_path / "data.jsonl", 2)
    (checkpoint / "recipe.yaml").unlink()  # killed before it was written
    _quietly(keys | {"resume": True})


@pytest.mark.parametrize("epochs", [1.5, 2.0])
def test_a_run_whose_epochs_are_done_is_not_trained_a_step_more(
    keys: dict[str, Any], tmp_path: Path, epochs: float
) -> None:
    keys |= {"max_steps": None, "epochs": epochs, "save": "steps", "save_steps": 2, "lr_scheduler": "constant"}
    whole = _weights(_quietly(keys).output_dir)
    (tmp_path / "out" / "adapter_model.safetensors").unlink()  # killed while it was saved
    said: list[Any] = []
    train(load_recipe(None, keys | {"resume": True}), say=said.append)
    assert any("steps are done: nothing is left to train." in str(text) for text in said)
    assert _same(whole, _weights(tmp_path / "out"))
    more = _quietly(keys | {"resume": True, "epochs": 3.0})
    assert not _same(whole, _weights(more.output_dir))
