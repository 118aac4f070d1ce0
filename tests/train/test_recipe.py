"""Recipes: YAML and dataclasses one-to-one, flags on top, and every mistake said with its nearest right key."""

import dataclasses
import inspect
from pathlib import Path

import pytest
import yaml

from reftune import ReftConfig
from reftune.train import Recipe, RecipeError, load_recipe, recipe_file, save_recipe, to_yaml
from reftune.train.recipe_file import recipe_keys
from reftune.train.run import reft_config, training_arguments

RECIPES = sorted((Path(__file__).parents[2] / "recipes").glob("*.yaml"))


def _write(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    return path


def test_a_written_recipe_reads_back_the_same(tmp_path: Path) -> None:
    recipe = load_recipe(
        None,
        {
            "layers": "[3, -1]",
            "data.columns": "{prompt: q, completion: a}",
            "system": 'Say: "no" # twice',
            "save": "no",
            "max_steps": "7",
            "lr": "1e-3",
        },
    )
    save_recipe(recipe, tmp_path / "out" / "recipe.yaml")
    assert load_recipe(tmp_path / "out" / "recipe.yaml") == recipe
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["recipe.yaml"]


def test_every_key_is_written_with_its_comment() -> None:
    text = to_yaml(Recipe())
    assert yaml.safe_load(text) == dataclasses.asdict(Recipe())
    for _, item in recipe_keys():
        assert item.metadata["help"]
        assert f"# {item.metadata['help']}" in text


def test_flags_override_the_file(tmp_path: Path) -> None:
    path = _write(tmp_path, "train:\n  lr: 1e-3\n  seed: 1\nreft: {layers: mid}\n")
    recipe = load_recipe(path, {"lr": "2e-3", "reft.layers": "all", "positions": "f2+l2", "model.name": "x"})
    assert (recipe.train.lr, recipe.train.seed) == (2e-3, 1)
    assert (recipe.reft.layers, recipe.reft.positions, recipe.model.name) == ("all", "f2+l2", "x")
    assert load_recipe(path).train.lr == 1e-3


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("trian: {}", r"'trian'. Did you mean train\?"),
        ("train: {learning_rate: 1}", r"Unknown key 'train.learning_rate'. Known here: output_dir"),
        ("train: {lrr: 1}", r"'train.lrr'. Did you mean train.lr\?"),
        ("train: {layers: all}", r"'train.layers'. Did you mean reft.layers\?"),
        ("reft: {position: all}", r"Did you mean reft.positions\?"),
        ("train: {lr: fast}", r"train.lr must be a number, but is 'fast' \(str\)"),
        ("train: {seed: 1.5}", "train.seed must be a whole number, but is 1.5"),
        ("train: {seed: true}", "train.seed must be a whole number, but is True"),
        ("train: {bf16: 1}", "train.bf16 must be true or false"),
        ("train: {save: sometimes}", "train.save must be no or epoch or steps"),
        ("train: {save_total_limit: x}", "must be a whole number or null"),
        ("reft: {layers: [a]}", "reft.layers must be text or a whole number or a list of whole numbers, but is"),
        ("data: {columns: [a]}", "data.columns must be keys with values or null"),
        ("train: 3", "train must be keys with values"),
        ("- a", "must be keys with values"),
        ("a: [", "is not YAML"),
    ],
)
def test_mistakes_are_said(tmp_path: Path, text: str, says: str) -> None:
    with pytest.raises(RecipeError, match=says):
        load_recipe(_write(tmp_path, text))


@pytest.mark.parametrize(
    ("key", "text", "value"),
    [
        ("layers", "3,9,18", [3, 9, 18]),
        ("layers", "[3, -1]", [3, -1]),
        ("layers", "3", 3),
        ("layers", "50%-70%", "50%-70%"),
        ("system", "Say: no, or yes", "Say: no, or yes"),
        ("system", "null", None),
        ("system", "42", "42"),
        ("model.name", "[odd", "[odd"),
        ("resume", "true", True),
        ("modules_to_save", "a,b", ["a", "b"]),
        ("save", "no", "no"),
    ],
)
def test_text_of_flags_means_what_it_says(key: str, text: str, value: object) -> None:
    recipe = load_recipe(None, {key: text})
    section, name = recipe_file._find(key)
    assert getattr(getattr(recipe, section), name) == value


def test_mistakes_in_flags_are_said_too() -> None:
    with pytest.raises(RecipeError, match=r"'lrr'. Did you mean train.lr\?"):
        load_recipe(None, {"lrr": "1"})
    with pytest.raises(RecipeError, match=r"'reft.positon'. Did you mean reft.positions\?"):
        load_recipe(None, {"reft.positon": "all"})
    with pytest.raises(RecipeError, match="There is no recipe"):
        load_recipe("nowhere.yaml")


def test_bare_keys_name_one_field_only() -> None:
    names = [item.name for _, item in recipe_keys()]
    twice = {name for name in names if names.count(name) > 1}
    assert not twice


def test_an_empty_section_means_its_defaults(tmp_path: Path) -> None:
    assert load_recipe(_write(tmp_path, "train:\nreft:\n"), {"lr": "1"}).train.lr == 1.0
    assert load_recipe(_write(tmp_path, "")) == Recipe()


def test_the_reft_section_is_the_config() -> None:
    ours = {item.name: item for section, item in recipe_keys() if section == "reft"}
    theirs = {field.name: field for field in dataclasses.fields(ReftConfig)}
    assert set(ours) <= set(theirs)
    for name, item in ours.items():
        if item.default is not dataclasses.MISSING:
            assert item.default == theirs[name].default, name
    config = reft_config(load_recipe(None, {"r": "2", "layers": "50%-70%"}))
    assert (config.r, config.layers, str(config.task_type)) == (2, "50%-70%", "CAUSAL_LM")


def test_training_arguments_follow_the_recipe(tmp_path: Path) -> None:
    keys = {"output_dir": str(tmp_path), "lr": "1e-3", "warmup": "0.1", "save": "epoch", "data.eval": "x.jsonl"}
    arguments = training_arguments(load_recipe(None, keys))
    assert arguments.learning_rate == 1e-3
    assert arguments.get_warmup_steps(100) == 10
    assert arguments.eval_strategy == "epoch"
    assert arguments.max_steps == -1


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.name)
def test_the_recipes_of_the_project_are_right(path: Path) -> None:
    recipe = load_recipe(path)
    reft_config(recipe)
    for line in path.read_text().splitlines():
        assert not line.strip() or "#" in line or line.startswith("#"), f"no comment: {line}"
    assert len(inspect.cleandoc(path.read_text())) > 100
