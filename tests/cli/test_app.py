"""The command line from train to chat, on a tiny model, and its errors in one line."""

import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

import pytest
from tests.tiny_chat import save_tiny
from typer.testing import CliRunner

import reftune.cli
from reftune.cli.app import app
from reftune.cli.flags import overrides
from reftune.interventions import INTERVENTIONS
from reftune.train import RecipeError, load_recipe
from reftune.train.recipe_file import recipe_keys


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """(directory, output) of one `reftune train`."""
    place = tmp_path_factory.mktemp("cli")
    (place / "data.jsonl").write_text(json.dumps({"prompt": "hi", "completion": "ho"}) + "\n")
    (place / "recipe.yaml").write_text(f"model: {{name: {save_tiny(place / 'base')}}}\ntrain: {{lr: 1e-3}}\n")
    arguments = ["train", str(place / "recipe.yaml"), "--data", str(place / "data.jsonl"), "--lr", "5e-2"]
    arguments += ["--layers", "0,1", "--output-dir", str(place / "out"), "--set", "train.max_steps=3", "--no-bf16"]
    result = CliRunner().invoke(app, arguments, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return place / "out", result.stdout


def test_train_takes_every_key_as_a_flag_and_says_how_to_chat(trained: tuple[Path, str]) -> None:
    directory, output = trained
    recipe = load_recipe(directory / "recipe.yaml")
    assert (recipe.train.lr, recipe.reft.layers, recipe.train.max_steps, recipe.train.bf16) == (0.05, [0, 1], 3, False)
    assert output.splitlines()[-1].endswith(f"reftune chat --adapter {directory}")
    help_text = CliRunner().invoke(app, ["train", "--help"], env={"COLUMNS": "200", "TERM": "dumb"}).output
    for _, item in recipe_keys():
        assert "--" + (item.metadata["flag"] or item.name).replace("_", "-") in help_text


def test_a_kind_of_ones_own_is_known_to_every_verb(
    trained: tuple[Path, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry not in ("", str(tmp_path))])
    Path("my_kinds.py").write_text(
        "import torch, reftune\n"
        '@reftune.register_intervention("my_shift")\n'
        "class MyShift(reftune.Intervention):\n"
        "    has_rank = False\n"
        "    def reset_parameters(self):\n"
        "        self.b = torch.nn.Parameter(torch.zeros(self.embed_dim))\n"
        "    def delta(self, h, segments=None):\n"
        "        return self.b.expand_as(h)\n"
    )
    recipe, out = str(trained[0] / "recipe.yaml"), str(tmp_path / "out")
    command = ["train", recipe, "--intervention", "my_shift", "--output-dir", out]
    try:
        unknown = CliRunner().invoke(app, command)
        assert "my_shift" in str(unknown.exception)
        done = CliRunner().invoke(app, ["--import", "my_kinds", *command], catch_exceptions=False)
        assert done.exit_code == 0, done.output
        answer = CliRunner().invoke(app, ["--import", "my_kinds", "generate", "--adapter", out, "hi"])
        assert answer.exit_code == 0, answer.output
    finally:
        INTERVENTIONS.pop("my_shift", None)
        sys.modules.pop("my_kinds", None)


@pytest.mark.parametrize("name", ["not_there", "my_kinds.py", "kinds/mine.py"])
def test_what_cannot_be_imported_is_said(name: str) -> None:
    result = CliRunner().invoke(app, ["--import", name, "info", "nowhere"])
    assert isinstance(result.exception, ImportError)
    assert f"--import {name}" in str(result.exception)
    assert ("no .py" in str(result.exception)) == (name != "not_there")


def test_flags_have_one_name_each() -> None:
    names = [item.metadata["flag"] or item.name for _, item in recipe_keys()]
    assert len(set(names)) == len(names)


def test_generate_answers_with_and_without_the_adapter(trained: tuple[Path, str]) -> None:
    adapter = str(trained[0])
    options = ["--max-new-tokens", "4"]
    run = CliRunner().invoke
    one = run(app, ["generate", "--adapter", adapter, "hi", *options], catch_exceptions=False).stdout
    both = run(app, ["generate", "--adapter", adapter, "hi", "you", *options], catch_exceptions=False).stdout
    assert both.startswith(f"> hi\n{one}")
    assert "> you\n" in both
    base = run(app, ["generate", "--adapter", adapter, "--no-adapter", "hi", *options], catch_exceptions=False).stdout
    alone = str(trained[0].parent / "base")
    assert base == run(app, ["generate", "--model", alone, "hi", *options], catch_exceptions=False).stdout


def test_chat_talks_until_quit(trained: tuple[Path, str]) -> None:
    lines = "/what\n/base\nhi\n/base\n/base again\n/reset\n\n/quit\nhi\n"
    arguments = ["chat", "--adapter", str(trained[0]), "--max-new-tokens", "3"]
    result = CliRunner().invoke(app, arguments, input=lines, catch_exceptions=False)
    assert result.exit_code == 0
    assert "no command /what" in result.stdout
    assert "no message yet" in result.stdout
    assert result.stdout.count("(base)") == 2
    assert "(forgotten)" in result.stdout


def test_explain_and_info_look_at_an_adapter(trained: tuple[Path, str]) -> None:
    adapter = str(trained[0])
    shown = CliRunner().invoke(app, ["explain", "--adapter", adapter, "hi"], catch_exceptions=False).stdout
    assert "tokens are edited" in shown
    shown = CliRunner().invoke(app, ["info", adapter], catch_exceptions=False).stdout
    assert "Positions" in shown
    assert "f2+l2" in shown
    shown = CliRunner().invoke(app, ["info", adapter, "--cost", "--new", "3"], catch_exceptions=False).stdout
    assert "128 prompt tokens and 3 new ones" in shown
    assert "by the closed form" in shown


def test_set_needs_a_key_and_a_value() -> None:
    assert overrides(["lr=1=2"], {"train__lr": None, "train__seed": "3"}) == {"lr": "1=2", "train.seed": "3"}
    with pytest.raises(RecipeError, match="KEY=VALUE"):
        overrides(["lr"], {})


def _main(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> Any:
    monkeypatch.setattr(sys, "argv", ["reftune", *arguments])
    with pytest.raises(SystemExit) as raised:
        reftune.cli.main()
    return raised.value.code


def test_bad_input_is_one_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    said = _main(monkeypatch, "train", str(tmp_path / "none.yaml"))
    assert said.startswith("reftune: There is no recipe")
    assert "\n" not in said
    (tmp_path / "a.yaml").write_text("train: {lrr: 1}")
    assert "Did you mean train.lr?" in _main(monkeypatch, "train", str(tmp_path / "a.yaml"))
    assert "No adapter here" in _main(monkeypatch, "chat", "--adapter", str(tmp_path))
    monkeypatch.setenv("REFTUNE_DEBUG", "1")
    monkeypatch.setattr(sys, "argv", ["reftune", "chat", "--adapter", str(tmp_path)])
    with pytest.raises(FileNotFoundError):
        reftune.cli.main()


def test_what_nobody_foresaw_is_one_line_with_its_kind(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def fail(*args: Any, **kwargs: Any) -> None:
        raise KeyError("odd")

    monkeypatch.setattr("reftune.cli.info.info", fail)
    assert _main(monkeypatch, "info", str(tmp_path)) == "reftune: KeyError: 'odd' (REFTUNE_DEBUG=1 shows where)"
    monkeypatch.setenv("REFTUNE_DEBUG", "1")
    monkeypatch.setattr(sys, "argv", ["reftune", "info", str(tmp_path)])
    with pytest.raises(KeyError):
        reftune.cli.main()


def test_a_missing_extra_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == "typer" else find(name, *a))
    assert _main(monkeypatch, "demo") == "reftune: the command line needs typer: pip install 'reftune[cli]'"
