"""Saving: our card, all or nothing, and every way back in."""

import json
import os
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import transformers.utils.hub
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load as load_bytes
from safetensors.torch import load_file

from conftest import tiny_llama
from reftune import ReftConfig, get_reft_model
from reftune.checkpoint import describe, install
from reftune.tuner.atomic import CONFIG, WEIGHTS

IDS = torch.tensor([[5, 6, 7, 8, 9]])


def adapted(positions: str = "f1", seed: int = 1, **settings) -> PeftModel:
    torch.manual_seed(seed)
    model = get_reft_model(tiny_llama(), ReftConfig(r=2, positions=positions, task_type="CAUSAL_LM", **settings))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.3 * torch.randn_like(parameter))
    return model.eval()


@torch.no_grad()
def logits(model: PeftModel) -> torch.Tensor:
    return model(input_ids=IDS).logits


def test_the_layout_is_peft_s_and_holds_only_r_w_and_b(tmp_path: Path) -> None:
    adapted("f1+l1").save_pretrained(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["README.md", CONFIG, WEIGHTS]
    assert sorted(load_file(tmp_path / WEIGHTS)) == [
        f"base_model.model.model.layers.2.edit_output.reft_{term}.{key}" for term in ("f1", "l1") for key in "RWb"
    ]
    card = (tmp_path / "README.md").read_text()
    for words in ("f1+l1", "| Layers | 2 of 4 |", "`block_output`", "260 parameters", "import reftune"):
        assert words in card


def test_a_card_that_a_person_wrote_stays(tmp_path: Path) -> None:
    model = adapted()
    model.save_pretrained(tmp_path)
    first = (tmp_path / "README.md").read_text()
    (tmp_path / "README.md").write_text("My adapter.")
    model.save_pretrained(tmp_path)
    assert (tmp_path / "README.md").read_text() == "My adapter."
    (tmp_path / "README.md").write_text(first.replace("260", "1"))
    model.save_pretrained(tmp_path)
    assert (tmp_path / "README.md").read_text() == first


class _KilledError(BaseException):
    pass


@pytest.mark.parametrize("moment", range(4))
def test_a_kill_during_a_save_leaves_the_old_adapter_or_the_new(
    moment: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old, new = adapted("f1", seed=1), adapted("l2", seed=2, modules_to_save=["lm_head"])
    old.save_pretrained(tmp_path)
    moved, replace = [], os.replace

    def killed(source: str, destination: str) -> None:
        if len(moved) == moment:
            raise _KilledError
        moved.append(destination)
        replace(source, destination)

    monkeypatch.setattr(os, "replace", killed)
    monkeypatch.setattr(shutil, "rmtree", lambda *a, **k: None)  # a killed process does not clean up
    if moment < 3:
        with pytest.raises(_KilledError):
            new.save_pretrained(tmp_path)
    else:
        new.save_pretrained(tmp_path)
    found = logits(PeftModel.from_pretrained(tiny_llama(), tmp_path))
    assert torch.equal(found, logits(new if moment == 3 else old))
    monkeypatch.undo()
    new.save_pretrained(tmp_path)  # what was left behind is in nobody's way
    assert torch.equal(logits(PeftModel.from_pretrained(tiny_llama(), tmp_path)), logits(new))


def test_a_save_that_fails_leaves_the_old_adapter_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old = adapted()
    old.save_pretrained(tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("peft.peft_model.safe_save_file", full)
    with pytest.raises(OSError, match="No space left"):
        adapted("l2", seed=2).save_pretrained(tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_what_killed_saves_left_goes_with_a_later_one(tmp_path: Path) -> None:
    old, new = tmp_path / ".saving-old", tmp_path / ".saving-of-another-process"
    for left in (old, new):
        left.mkdir()
        (left / "adapter_model.safetensors").write_bytes(b"half")
    os.utime(old, (0, 0))
    model = get_reft_model(tiny_llama(), ReftConfig(layers=[1]))
    model.save_pretrained(tmp_path)
    assert (old.exists(), new.exists()) == (False, True)


def test_the_weights_carry_the_config_they_were_saved_with(tmp_path: Path) -> None:
    model = adapted("f1+l1")
    model.save_pretrained(tmp_path)
    torn = json.loads((tmp_path / CONFIG).read_text()) | {"positions": "f2"}
    (tmp_path / CONFIG).write_text(json.dumps(torn))
    assert torch.equal(logits(PeftModel.from_pretrained(tiny_llama(), tmp_path)), logits(model))


def test_the_base_may_be_given_another_name_in_the_config(tmp_path: Path) -> None:
    model = adapted()
    model.peft_config["default"].base_model_name_or_path = "/old/base"
    model.save_pretrained(tmp_path, save_embedding_layers=False)
    config = json.loads((tmp_path / CONFIG).read_text())
    for change, name in (({}, "/new/base"), ({"positions": "f2"}, "/old/base")):  # the second is torn
        (tmp_path / CONFIG).write_text(json.dumps({**config, "base_model_name_or_path": "/new/base", **change}))
        model = PeftModel.from_pretrained(tiny_llama(), tmp_path)
        assert model.peft_config["default"].base_model_name_or_path == describe(tmp_path).base_model == name
        assert model.peft_config["default"].positions == "f1"
    config["base_model_name_or_path"] = "/new/base"
    (tmp_path / CONFIG).write_text(json.dumps(config))
    PeftModel.from_pretrained(tiny_llama(), tmp_path).save_pretrained(tmp_path / "again", save_embedding_layers=False)
    assert json.loads((tmp_path / "again" / CONFIG).read_text())["base_model_name_or_path"] == "/new/base"


@pytest.mark.parametrize("name", ["default", "other"])
def test_pickled_weights_are_not_hidden_by_older_ones(name: str, tmp_path: Path) -> None:
    place = tmp_path if name == "default" else tmp_path / name
    for seed in (1, 2):
        base = tiny_llama()
        torch.manual_seed(seed)
        model = get_reft_model(base, ReftConfig(init_weights=False, task_type="CAUSAL_LM"), name).eval()
        model.save_pretrained(tmp_path, safe_serialization=seed == 1)
    assert torch.equal(logits(PeftModel.from_pretrained(tiny_llama(), place)), logits(model))
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(PeftModel.from_pretrained(tiny_llama(), place)), logits(model))


@pytest.mark.parametrize("layers", [range(1, 3), (1, 2)])
def test_layers_need_not_be_a_list(layers: object, tmp_path: Path) -> None:
    model = adapted(layers=layers)
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(PeftModel.from_pretrained(tiny_llama(), tmp_path)), logits(model))


def test_arguments_may_come_by_position(tmp_path: Path) -> None:
    model = adapted()
    model.add_adapter("other", ReftConfig(task_type="CAUSAL_LM"))
    model.save_pretrained(tmp_path, True, ["default"])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["README.md", CONFIG, WEIGHTS]
    model.save_pretrained(tmp_path / "none", True, None, "auto", False)  # not the main process
    assert not (tmp_path / "none" / WEIGHTS).exists()


def test_several_adapters_are_saved_beside_each_other_as_peft_does(tmp_path: Path) -> None:
    model = adapted()
    model.add_adapter("other", ReftConfig(r=3, positions="l1", task_type="CAUSAL_LM"))
    model.save_pretrained(tmp_path)
    assert (tmp_path / "other" / WEIGHTS).is_file()
    assert "`l1`" in (tmp_path / "other" / "README.md").read_text()
    assert "`f1`" in (tmp_path / "README.md").read_text()
    model.save_pretrained(tmp_path / "one", selected_adapters=["other"])
    assert not (tmp_path / "one" / WEIGHTS).exists()
    loaded = PeftModel.from_pretrained(tiny_llama(), tmp_path / "one" / "other")
    assert loaded.peft_config["default"].r == 3


@pytest.mark.parametrize("on_the_hub", [None, "---\ntags: [mine]\n---\nWritten by hand.\n"])
def test_what_is_pushed_to_the_hub_is_what_is_saved(
    on_the_hub: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Up to the last step, the request; transformers puts the hub's card, or a blank one, over ours before it."""
    from huggingface_hub import ModelCard
    from huggingface_hub.errors import EntryNotFoundError

    pushed = {}

    def upload(self, working_dir, repo_id, files_timestamps, **kwargs):
        pushed.update({p.name: p.read_bytes() for p in Path(working_dir).iterdir()})

    def load(source, **kwargs):
        if Path(source).is_file():
            return ModelCard(Path(source).read_text())
        if on_the_hub is None:
            raise EntryNotFoundError("none")
        return ModelCard(on_the_hub)

    def create_repo(*args, **kwargs):
        return SimpleNamespace(repo_id="me/it")

    for name in ("save_pretrained", "_upload_modified_files"):
        monkeypatch.setattr(PeftModel, name, getattr(PeftModel, name).__wrapped__)
    monkeypatch.setattr(PeftModel, "_upload_modified_files", upload)
    monkeypatch.setattr("huggingface_hub.ModelCard.load", load)
    if hasattr(transformers.utils.hub, "hf_api"):
        monkeypatch.setattr("transformers.utils.hub.hf_api", lambda: SimpleNamespace(create_repo=create_repo))
    else:  # transformers 5.0
        monkeypatch.setattr("transformers.utils.hub.create_repo", create_repo)
    install()
    model = adapted()
    model.push_to_hub("me/it", tags=["emoji"])
    model.save_pretrained(tmp_path)
    card = pushed.pop("README.md").decode()
    assert sorted(pushed) == [CONFIG, WEIGHTS]
    assert pushed[CONFIG] == (tmp_path / CONFIG).read_bytes()
    found, saved = load_bytes(pushed[WEIGHTS]), load_file(tmp_path / WEIGHTS)
    assert found.keys() == saved.keys()
    assert all(torch.equal(found[key], saved[key]) for key in saved)
    if on_the_hub:
        assert "Written by hand." in card
    else:
        body, tags = (tmp_path / "README.md").read_text().split("---\n", 2)[2], ModelCard(card).data.tags
        assert body.strip() in card
        assert tags == ["reft", "reftune", "peft", "emoji"]


def test_adapters_of_other_kinds_are_saved_by_peft_alone(tmp_path: Path) -> None:
    get_peft_model(tiny_llama(), LoraConfig(r=2)).save_pretrained(tmp_path)
    assert "reftune" not in (tmp_path / "README.md").read_text()


def test_a_file_in_the_way_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("")
    with pytest.raises(ValueError, match="should be a directory, not a file"):
        adapted().save_pretrained(tmp_path / "a")


def test_the_bundled_base_is_not_looked_up_on_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """PEFT warns "Could not find a config file in smollm2-135m"; warnings are errors here."""
    base = tiny_llama()
    base.name_or_path = base.config._name_or_path = "smollm2-135m"
    monkeypatch.setattr("peft.utils.save_and_load.check_file_exists_on_hf_hub", lambda *a, **k: False)
    get_reft_model(base, ReftConfig(r=2)).save_pretrained(tmp_path)
    assert (tmp_path / WEIGHTS).is_file()
