"""Saving and loading a composition: the same numbers, nothing torn, and clear errors for bad directories."""

import contextlib
import json
import os
import shutil

import pytest
import torch
from peft import LoraConfig
from safetensors.torch import load_file, save_file
from several import PROMPT, assert_close, logits, several, shake

from conftest import tiny_llama
from families import tiny
from reftune.composition import adapters, compose, current, load_composed, load_composition, save_composition
from reftune.composition.sharing import is_composition, read_composition
from reftune.tuner.layer import ReftLayer
from tiny_chat import save_tiny


@pytest.fixture
def model():
    return several(style={"r": 2}, tone={"r": 3, "layers": [2, 3], "positions": "l2"}, default={})


@pytest.fixture
def saved(model, tmp_path):
    style, tone = adapters(model, "style", "tone")
    save_composition(model, style + 0.5 * tone, tmp_path / "mine")
    return tmp_path / "mine"


def files(directory):
    return {str(path.relative_to(directory)) for path in directory.rglob("*") if path.is_file()}


def rewrite(directory, **changes):
    path = directory / "composition.json"
    content = json.loads(path.read_text())
    path.write_text(json.dumps({**content, **changes}))


def test_what_was_saved_is_loaded(model, saved):
    style, tone = adapters(model, "style", "tone")
    with (style + 0.5 * tone).on(model):
        wanted = logits(model)
    loaded = load_composition(tiny("llama"), saved).eval()
    assert_close(logits(loaded), wanted)
    assert current(loaded) == style + 0.5 * tone
    assert files(saved) == {"composition.json"} | {
        f"{name}/{file}"
        for name in ("style", "tone")
        for file in ("adapter_config.json", "adapter_model.safetensors", "README.md")
    }
    assert is_composition(saved)
    assert not is_composition(saved / "style")
    assert not any(p.requires_grad for p in loaded.parameters())


def test_a_sequence_and_the_default_adapter(model, tmp_path):
    mix = compose({"tone": 0.3, "default": -1.0, "style": 0.0}, how="sequence")
    save_composition(model, mix, tmp_path)
    loaded = load_composition(tiny("llama"), tmp_path).eval()
    assert current(loaded) == mix
    assert list(current(loaded).strengths) == ["tone", "default", "style"]
    with mix.on(model):
        assert_close(logits(loaded), logits(model))
    assert (tmp_path / "default" / "adapter_config.json").is_file()


def test_a_baked_adapter_is_saved_like_any_other(model, tmp_path):
    model.add_weighted_adapter(["style", "default"], [1.0, 0.5], "both")
    save_composition(model, compose({"both": 1.0}), tmp_path)
    with compose({"both": 1.0}).on(model):
        assert_close(logits(load_composition(tiny("llama"), tmp_path).eval()), logits(model))


def test_it_is_loaded_beside_what_is_there(saved):
    other = several(mine={"r": 1})
    before = logits(other)
    assert load_composition(other, saved) is other
    assert list(other.peft_config) == ["mine", "style", "tone"]
    with compose({"mine": 1.0}).on(other):
        assert_close(logits(other), before)
    with pytest.raises(ValueError, match="has an adapter 'style' already"):
        load_composition(other, saved)


def test_the_adapters_load_one_by_one_too(model, saved):
    from peft import PeftModel

    loaded = PeftModel.from_pretrained(tiny("llama"), saved / "tone").eval()
    model.set_adapter("tone")
    assert_close(logits(loaded), logits(model))


def test_with_the_base_it_names(tmp_path):
    base = save_tiny(tmp_path / "base")
    from reftune import load_model

    plain, _ = load_model(str(base))
    model = several(base=plain, style={"layers": [1]}, tone={"layers": [0, 1], "positions": "l2"})
    save_composition(model, compose({"style": 1.0, "tone": 0.5}), tmp_path / "mine")
    loaded, tokenizer = load_composed(tmp_path / "mine")
    with compose({"style": 1.0, "tone": 0.5}).on(model):
        assert_close(logits(loaded.eval()), logits(model))
    assert tokenizer("a")["input_ids"]
    rewrite(tmp_path / "mine", base_model_name_or_path=None)
    with pytest.raises(ValueError, match="does not name its base model"):
        load_composed(tmp_path / "mine")


# -- saving again, and being cut off ----------------------------------------------------------------------------------


def test_saving_again_replaces(model, saved):
    (saved / "notes.txt").write_text("mine")
    before = files(saved)
    save_composition(model, compose({"style": 1.0, "tone": 0.5}), saved)
    assert files(saved) == before  # the same adapters: nothing is written anew
    shake(model, "tone", 9)
    save_composition(model, compose({"tone": 2.0, "default": 1.0}), saved)
    assert {f.split("/")[0].split("-")[0] for f in files(saved)} == {"composition.json", "notes.txt", "tone", "default"}
    loaded = load_composition(tiny("llama"), saved).eval()
    with compose({"tone": 2.0, "default": 1.0}).on(model):
        assert_close(logits(loaded), logits(model))
    assert not list(saved.glob(".saving-*"))


@pytest.mark.parametrize("stop", range(1, 9))
def test_a_save_that_is_cut_off_leaves_the_old_composition(model, saved, monkeypatch, stop):
    """Every rename, file move and removal is a point where the process may die."""
    with compose({"style": 1.0, "tone": 0.5}).on(model):
        old = logits(model)
    shake(model, "tone", 9)
    new_mix = compose({"tone": 2.0, "default": 1.0})
    with new_mix.on(model):
        new = logits(model)

    class Killed(BaseException):
        pass

    count = 0

    def counted(function):
        def call(*args, **kwargs):
            nonlocal count
            count += 1
            if count == stop:
                raise Killed
            return function(*args, **kwargs)

        return call

    with monkeypatch.context() as patch:
        patch.setattr(os, "rename", counted(os.rename))
        patch.setattr(os, "replace", counted(os.replace))
        patch.setattr(shutil, "rmtree", counted(shutil.rmtree))
        with contextlib.suppress(Killed):
            save_composition(model, new_mix, saved)
    found = logits(load_composition(tiny("llama"), saved).eval())
    assert min(float((found - x).abs().max()) for x in (old, new)) < 1e-5
    save_composition(model, new_mix, saved)  # and a second try succeeds
    assert_close(logits(load_composition(tiny("llama"), saved).eval()), new)


def test_an_unrelated_folder_of_the_same_name_is_left_alone(model, tmp_path):
    (tmp_path / "style").mkdir()
    (tmp_path / "style" / "poem.txt").write_text("roses")
    save_composition(model, compose({"style": 1.0}), tmp_path)
    assert (tmp_path / "style" / "poem.txt").read_text() == "roses"
    assert read_composition(tmp_path).folders["style"].startswith("style-")
    with compose({"style": 1.0}).on(model):
        assert_close(logits(load_composition(tiny("llama"), tmp_path).eval()), logits(model))


def test_what_an_adapter_trained_whole_is_in_use_again(tmp_path):
    model = several(style={}, tone={"modules_to_save": ["lm_head"]})
    with torch.no_grad():
        model.get_base_model().lm_head.modules_to_save["tone"].weight.mul_(2)
    model.set_adapter("tone")
    mix = compose({"style": 1.0, "tone": 0.5})
    save_composition(model, mix, tmp_path)
    with mix.on(model):
        loaded = load_composition(tiny("llama"), tmp_path).eval()
        assert_close(logits(loaded), logits(model))
    assert not any(parameter.requires_grad for parameter in loaded.parameters())  # nobody asked to train


def test_the_tokens_that_an_adapter_trained_are_in_use_again_beside_others(tmp_path):
    model = several(tone={"trainable_token_indices": [5, 9]})
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad and ".reft_" not in name:
                parameter.mul_(2)
    save_composition(model, compose({"tone": 0.5}), tmp_path)
    with compose({"tone": 0.5}).on(model):
        assert_close(logits(load_composition(several(mine={}), tmp_path)), logits(model))


def test_a_composition_that_cannot_act_beside_the_models_own_adapter_leaves_it_alone(tmp_path):
    save_composition(several(style={}), compose({"style": 1.0}), tmp_path)
    own = several(mine={"lora": LoraConfig(target_modules=["q_proj"])})
    before = logits(own)
    with pytest.raises(ValueError, match="The active adapter 'mine' has a LoRA part, which would act beside"):
        load_composition(own, tmp_path)
    assert list(own.peft_config) == own.active_adapters == ["mine"]
    assert torch.equal(logits(own), before)


# -- what is refused ------------------------------------------------------------------------------------------------


def test_bad_saves_write_nothing(model, tmp_path):
    target = tmp_path / "x"
    with pytest.raises(ValueError, match="There is no adapter 'x'"):
        save_composition(model, compose({"x": 1.0}), target)
    with pytest.raises(ValueError, match="no adapter, so there is nothing"):
        save_composition(model, compose({}), target)
    with pytest.raises(TypeError, match="PeftModel"):
        save_composition(model.get_base_model(), compose({"style": 1.0}), target)
    assert not target.exists()
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="is a file"):
        save_composition(model, compose({"style": 1.0}), tmp_path / "file")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"version": 2}, "version 2, and this reftune reads version 1"),
        ({"adapters": []}, "it lists no adapters"),
        ({"adapters": [{"name": "style"}]}, "must have a name, a strength and a folder"),
        ({"adapters": [{"name": "style", "folder": "../style", "strength": 1}]}, "is not a plain name"),
        ({"adapters": [{"name": "style", "folder": "/etc", "strength": 1}]}, "is not a plain name"),
        ({"adapters": [{"name": "style", "folder": "..", "strength": 1}]}, "is not a plain name"),
        ({"adapters": [{"name": "style", "folder": "style", "strength": "much"}]}, "finite number, but is 'much'"),
        ({"adapters": [{"name": "style", "folder": "style"}]}, "finite number, but is None"),
        ({"adapters": [{"name": "style", "folder": "style", "strength": 1}] * 2}, "comes twice"),
        ({"how": "product"}, "how must be"),
    ],
)
def test_bad_files_are_said(saved, changes, message):
    rewrite(saved, **changes)
    with pytest.raises(ValueError, match=rf"composition.json is no composition .*: .*{message}"):
        load_composition(tiny("llama"), saved)


def test_torn_and_missing_files_are_said(saved, tmp_path):
    base = tiny("llama")
    before = logits(base)
    with pytest.raises(FileNotFoundError, match=r"No composition here: .* has no composition.json"):
        load_composition(base, tmp_path)
    text = (saved / "composition.json").read_text()
    (saved / "composition.json").write_text(text[:40])
    with pytest.raises(ValueError, match="it is not JSON"):
        load_composition(base, saved)
    (saved / "composition.json").write_text("[]")
    with pytest.raises(ValueError, match="it lists no adapters"):
        load_composition(base, saved)
    (saved / "composition.json").write_text(text)
    (saved / "tone" / "adapter_model.safetensors").rename(saved / "elsewhere")
    with pytest.raises(FileNotFoundError, match=r"is incomplete: tone/adapter_model.safetensors is missing"):
        load_composition(base, saved)
    assert torch.equal(logits(base), before)


@pytest.mark.parametrize("order", [["tone", "style"], ["style", "tone"]])
def test_an_adapter_with_a_lora_part_may_have_the_strength_zero(order, tmp_path):
    model = several(tone={}, style={"lora": LoraConfig(target_modules=["q_proj"], init_lora_weights=False)})
    mix = compose({name: float(name == "tone") for name in order})
    with mix.on(model):
        wanted = logits(model)
    save_composition(model, mix, tmp_path)
    loaded = load_composition(tiny("llama"), tmp_path)
    assert_close(logits(loaded), wanted)
    assert current(loaded) == mix


def test_a_broken_adapter_leaves_the_base_as_it_was(saved):
    weights = saved / "tone" / "adapter_model.safetensors"
    state = load_file(weights)
    state.pop(next(iter(state)))
    save_file(state, weights, metadata={"format": "pt"})
    base = tiny("llama")
    before = logits(base)
    with pytest.raises(ValueError, match="tensors 1 missing"):
        load_composition(base, saved)
    assert torch.equal(logits(base), before)
    assert not any(isinstance(module, ReftLayer) for module in base.modules())
    model = several(mine={})
    first = logits(model)
    with pytest.raises(ValueError, match="tensors 1 missing"):
        load_composition(model, saved)
    assert list(model.peft_config) == ["mine"]
    assert torch.equal(logits(model), first)


def test_another_base_is_refused(saved):
    for base in (tiny("gpt2"), tiny_llama(hidden=64), tiny_llama(layers=6)):
        with pytest.raises(ValueError, match="does not fit this base model"):
            load_composition(base, saved)
        assert base(PROMPT[:1]).logits.shape[-1] == 99
