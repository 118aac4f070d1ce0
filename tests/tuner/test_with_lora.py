"""LoRA and ReFT on one model: together or one after the other, in a Trainer's checkpoints, switched and saved apart."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import IA3Config, LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file
from torch import Tensor

from conftest import tiny_llama
from integration.tiny_training import Rows, losses, trainer
from reftune import ReftConfig, compose, get_reft_model
from reftune.interventions import orthonormality_error
from reftune.tuner.apart import load_on_lora, save_lora, save_reft

IDS = torch.tensor([[5, 6, 7, 8, 9], [9, 8, 7, 6, 5]])


def lora_config(**settings: Any) -> LoraConfig:
    return LoraConfig(**{"r": 2, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM", **settings})


def reft_config(**settings: Any) -> ReftConfig:
    return ReftConfig(**{"r": 2, "layers": [0, 1], "task_type": "CAUSAL_LM", **settings})


def both(**settings: Any) -> PeftModel:
    torch.manual_seed(1)
    return get_reft_model(tiny_llama(layers=3), reft_config(lora=lora_config(), **settings))


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        return model.eval()(IDS).logits


def tensors(model: Any, part: str) -> dict[str, Tensor]:
    return {n: p.detach().clone() for n, p in model.named_parameters() if f".{part}_" in n}


def randomise(model: Any) -> None:
    """Nothing zero: LoRA's B and ReFT's edit act."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".lora_B" in name or (".reft_" in name and name.endswith(("W", "b"))):
                parameter.add_(0.2 * torch.randn_like(parameter))


def trained_lora(directory: Path) -> PeftModel:
    """A LoRA adapter trained by PEFT alone, saved, and loaded for inference."""
    torch.manual_seed(1)
    model = get_peft_model(tiny_llama(layers=3), lora_config())
    trainer(model, directory / "training").train()
    model.save_pretrained(directory / "lora")
    return PeftModel.from_pretrained(tiny_llama(layers=3), directory / "lora")


# -- trained ----------------------------------------------------------------------------------------------------------


def test_together_from_the_start(tmp_path: Path) -> None:
    model = both()
    base = tiny_llama(layers=3)
    assert torch.equal(logits(model), logits(base))  # both start at zero
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    run = trainer(model, tmp_path, max_steps=15, weight_decay=0.1)
    run.train()
    assert losses(run)[-1] < losses(run)[0]
    for name, parameter in model.named_parameters():
        adapter = ".lora_" in name or ".reft_" in name
        assert parameter.requires_grad == adapter, name
        assert torch.equal(parameter, before[name]) != adapter, name
    assert not torch.equal(logits(model), logits(base))
    with model.disable_adapter():
        assert torch.equal(logits(model), logits(base))  # bit for bit
    assert all(p.requires_grad for n, p in model.named_parameters() if ".lora_" in n or ".reft_" in n)


def test_lora_first_then_reft_on_it_frozen(tmp_path: Path) -> None:
    lora = trained_lora(tmp_path)
    expected = logits(lora)
    weights = tensors(lora, "lora")
    model = get_reft_model(lora, reft_config())
    assert torch.equal(logits(model), expected)  # ReFT starts at zero
    trainer(model, tmp_path, max_steps=8, learning_rate=0.1).train()
    for name, parameter in model.named_parameters():
        assert parameter.requires_grad == (".reft_" in name), name
        if "lora_" in name:
            assert torch.equal(parameter, weights[name])
    with model.disable_reft():
        assert torch.equal(logits(model), expected)
    model.save_pretrained(tmp_path / "both")
    loaded = PeftModel.from_pretrained(tiny_llama(layers=3), tmp_path / "both")
    assert torch.equal(logits(loaded), logits(model))


def test_lora_first_then_both_on(tmp_path: Path) -> None:
    trained_lora(tmp_path)
    lora = PeftModel.from_pretrained(tiny_llama(layers=3), tmp_path / "lora", is_trainable=True)
    model = get_reft_model(lora, reft_config(), adapter_name="mine")  # LoRA's adapter takes the name
    before = tensors(model, "lora")
    assert all(".mine." in name for name in before)
    trainer(model, tmp_path, max_steps=4).train()
    assert all(not torch.equal(value, before[name]) for name, value in tensors(model, "lora").items())


def test_one_part_is_trained_alone(tmp_path: Path) -> None:
    model = both()
    for part, other in (("reft", "lora"), ("lora", "reft")):
        model.train_parts(part)
        logits(model)  # the optimiser's last step leaves R off its manifold until it is next used
        frozen, trains = tensors(model, other), tensors(model, part)
        with model.disable_adapter():  # as DPO does for its reference: PEFT makes everything trainable after it
            logits(model)
        trainer(model, tmp_path, max_steps=3, weight_decay=0.1).train()
        assert all(torch.equal(value, frozen[name]) for name, value in tensors(model, other).items())
        assert any(not torch.equal(value, trains[name]) for name, value in tensors(model, part).items())
    model.train_parts("both")
    assert all(p.requires_grad for n, p in model.named_parameters() if ".lora_" in n or ".reft_" in n)
    with pytest.raises(ValueError, match='parts must be "lora", "reft" or "both", but is \'lora and reft\''):
        model.train_parts("lora and reft")


# -- a Trainer's checkpoints ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("way", ["together", "lora first"])
def test_checkpoints_are_small_and_resuming_is_exact(tmp_path: Path, way: str) -> None:
    options: dict[str, Any] = {"save_strategy": "steps", "save_steps": 4, "max_steps": 9, "weight_decay": 0.1}
    if way == "lora first":
        trained_lora(tmp_path)

    def fresh() -> PeftModel:
        if way == "together":
            return both()
        lora = PeftModel.from_pretrained(tiny_llama(layers=3), tmp_path / "lora", is_trainable=True)
        torch.manual_seed(1)
        return get_reft_model(lora, reft_config())

    whole = trainer(fresh(), tmp_path / "whole", **options)
    whole.train()
    checkpoint = tmp_path / "whole" / "checkpoint-4"
    own = [p for n, p in whole.model.named_parameters() if ".lora_" in n or ".reft_" in n]
    assert (checkpoint / "adapter_model.safetensors").stat().st_size < sum(p.numel() * 4 for p in own) + 12_000
    assert not list(checkpoint.glob("model*")) + list(checkpoint.glob("pytorch_model*"))
    assert not [d for d in checkpoint.iterdir() if d.is_dir()]

    resumed = trainer(fresh(), tmp_path / "resumed", **options)
    resumed.train(resume_from_checkpoint=str(checkpoint))
    assert losses(resumed)[-5:] == losses(whole)[-5:]
    for part in ("lora", "reft"):
        expected = tensors(whole.model, part)
        assert expected
        assert all(torch.equal(value, expected[name]) for name, value in tensors(resumed.model, part).items())

    model = PeftModel.from_pretrained(tiny_llama(layers=3), checkpoint, is_trainable=True)
    again = trainer(model, tmp_path / "again", **options)
    again.train(resume_from_checkpoint=str(checkpoint))
    assert losses(again)[-5:] == losses(whole)[-5:]


def test_the_best_model_is_loaded_at_the_end(tmp_path: Path) -> None:
    model = both()
    options = {"eval_strategy": "steps", "save_strategy": "steps", "eval_steps": 2, "save_steps": 2, "max_steps": 10}
    run = trainer(
        model, tmp_path, eval_dataset=Rows(8, seed=1), load_best_model_at_end=True, learning_rate=0.5, **options
    )
    run.train()
    evaluated = {e["step"]: e["eval_loss"] for e in run.state.log_history if "eval_loss" in e}
    best = min(evaluated, key=evaluated.__getitem__)
    assert best != 10
    saved = load_file(tmp_path / f"checkpoint-{best}" / "adapter_model.safetensors")
    now = {n.replace(".default", ""): v for part in ("lora", "reft") for n, v in tensors(model, part).items()}
    assert saved.keys() == now.keys()
    assert all(torch.equal(saved[name], now[name]) for name in saved)


def test_rows_are_orthonormal_after_hard_training(tmp_path: Path) -> None:
    model = both()
    run = trainer(model, tmp_path, weight_decay=0.3, learning_rate=0.5, max_steps=10)
    run.train()
    run.save_model()
    rows = [v for n, v in load_file(tmp_path / "adapter_model.safetensors").items() if n.endswith(".R")]
    assert len(rows) == 4
    assert all(orthonormality_error(r) < 1e-5 for r in rows)


# -- saved, loaded, switched ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("settings", [{}, {"use_dora": True}, {"use_rslora": True, "target_modules": "all-linear"}])
def test_saved_equals_loaded(tmp_path: Path, settings: dict[str, Any]) -> None:
    model = get_reft_model(tiny_llama(layers=3), reft_config(lora=lora_config(**settings)))
    randomise(model)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny_llama(layers=3), tmp_path)
    assert torch.equal(logits(loaded), logits(model))
    assert not any(p.requires_grad for p in loaded.parameters())
    loaded.load_adapter(tmp_path, "other")
    loaded.set_adapter("other")
    torch.testing.assert_close(logits(loaded), logits(model))


def test_the_parts_apart(tmp_path: Path) -> None:
    """LoRA's file is PEFT's own: it loads without us. ReFT's loads on it."""
    model = both()
    randomise(model)
    save_lora(model, tmp_path / "lora")
    save_reft(model, tmp_path / "reft")
    lora = PeftModel.from_pretrained(tiny_llama(layers=3), tmp_path / "lora")
    assert type(lora.base_model).__name__ == "LoraModel"
    with model.disable_reft():
        assert torch.equal(logits(lora), logits(model))
    loaded = load_on_lora(lora, str(tmp_path / "reft"))
    assert torch.equal(logits(loaded), logits(model))
    assert not any(p.requires_grad for p in loaded.parameters())
    with pytest.raises(ValueError, match=r"no LoRA part to save apart: use model\.save_pretrained"):
        save_lora(get_reft_model(tiny_llama(), reft_config()), tmp_path)


def test_the_parts_are_switched_apart() -> None:
    model = both()
    randomise(model)
    base = logits(tiny_llama(layers=3))
    whole = logits(model)
    alone = copy.deepcopy(model)
    with model.disable_lora():
        reft = logits(model)
    with model.disable_reft():
        lora = logits(model)
        with model.disable_lora():
            assert torch.equal(logits(model), base)
    assert torch.equal(logits(model), whole)
    assert len({tuple(t.flatten().tolist()) for t in (base, whole, reft, lora)}) == 4
    with torch.no_grad():
        for name, parameter in alone.named_parameters():
            if ".lora_B" in name:
                parameter.zero_()
    torch.testing.assert_close(logits(alone), reft)


def test_adapters_with_and_without_a_lora_part() -> None:
    model = get_reft_model(tiny_llama(layers=3), reft_config(), "plain")
    torch.manual_seed(2)
    model.add_adapter("mixed", reft_config(lora=lora_config()))
    model.add_adapter("also", reft_config(lora=lora_config(r=4, target_modules=["q_proj", "o_proj"])))
    assert all(
        p.requires_grad == (".plain." in n) for n, p in model.named_parameters() if ".lora_" in n or ".reft_" in n
    )
    randomise(model)
    each = {}
    for name in ("plain", "mixed", "also"):
        model.set_adapter(name)
        each[name] = logits(model)
        trains = {n for n, p in model.named_parameters() if p.requires_grad}
        assert trains == {n for n, _ in model.named_parameters() if f".{name}." in n}
    model.delete_adapter("also")
    model.set_adapter("mixed")
    assert torch.equal(logits(model), each["mixed"])
    with pytest.raises(ValueError, match="'mixed' has a LoRA part, which acts on whole batches"):
        model.eval()(IDS, adapter_names=["mixed", "plain"])
    model.delete_adapter("mixed")
    assert not any(isinstance(module, LoraLayer) for module in model.modules())
    assert torch.equal(logits(model), each["plain"])


def test_an_active_lora_part_does_not_act_on_rows_or_in_compositions_of_others() -> None:
    model = get_reft_model(tiny_llama(layers=3), reft_config(), "plain")
    model.add_adapter("mixed", reft_config(lora=lora_config()))
    randomise(model)
    plain = logits(model)
    with pytest.raises(ValueError, match=r"'mixed' has a LoRA part, .* make it the active adapter first"):
        compose({"plain": 1.0, "mixed": 0.5}).apply(model)
    compose({"plain": 1.0, "mixed": 0.0}).apply(model)
    torch.testing.assert_close(logits(model), plain)
    model.set_adapter("mixed")
    mixed = logits(model)
    with pytest.raises(ValueError, match=r"The active adapter 'mixed' has a LoRA part, .* on rows of other adapters"):
        model(IDS, adapter_names=["plain", "__base__"])
    with pytest.raises(ValueError, match="The active adapter 'mixed' has a LoRA part, which would act beside"):
        compose({"plain": 1.0}).apply(model)
    with compose({"mixed": 1.0}).on(model):
        torch.testing.assert_close(logits(model), mixed)
    with model.disable_lora(), torch.no_grad():
        rows = model(IDS, adapter_names=["plain", "__base__"]).logits
        with compose({"plain": 1.0}).on(model):
            torch.testing.assert_close(logits(model), plain)
        reft = logits(model)
        model.set_adapter("plain")
        with compose({"mixed": 1.0}).on(model):  # its edits alone, as asked for
            torch.testing.assert_close(logits(model), reft)
    torch.testing.assert_close(rows[0], plain[0])
    assert torch.equal(rows[1], logits(tiny_llama(layers=3))[1])


def test_unload_gives_the_base_back() -> None:
    model = both()
    randomise(model)
    base = model.unload()
    assert [n for n, _ in base.named_modules()] == [n for n, _ in tiny_llama(layers=3).named_modules()]
    assert torch.equal(logits(base), logits(tiny_llama(layers=3)))


def test_merging_with_a_lora_part_is_refused() -> None:
    model = both(component="mlp_output", positions="all")
    expected = logits(model)
    with pytest.raises(ValueError, match="'default' has a LoRA adapter with it"):
        model.merge_and_unload()
    assert torch.equal(logits(model), expected)


# -- what cannot be meant ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("lora", "message"),
    [
        ({"bias": "all"}, "cannot have bias='all'"),
        ({"modules_to_save": ["lm_head"]}, "cannot have modules_to_save=.*name them in the ReftConfig"),
        ({"init_lora_weights": "pissa"}, "cannot have init_lora_weights='pissa'"),
    ],
)
def test_lora_settings_that_would_not_be_saved(lora: dict, message: str) -> None:
    base = tiny_llama()
    names = [name for name, _ in base.named_modules()]
    with pytest.raises(ValueError, match=message):
        get_reft_model(base, reft_config(lora=lora_config(**lora)))
    assert [name for name, _ in base.named_modules()] == names


@pytest.mark.filterwarnings("ignore:Already found a `peft_config`")
@pytest.mark.filterwarnings("ignore:You are trying to modify a model with PEFT for a second time")
def test_other_errors_leave_the_model_as_it_was(tmp_path: Path) -> None:
    base = tiny_llama()
    names = [name for name, _ in base.named_modules()]
    with pytest.raises(ValueError, match="is edited by ReFT as well"):
        get_reft_model(base, reft_config(lora=lora_config(), component="model.layers[0].self_attn.q_proj.output"))
    with pytest.raises(ValueError, match=r"must be a peft\.LoraConfig"):
        get_reft_model(base, reft_config(lora=IA3Config(target_modules=["q_proj"], feedforward_modules=[])))
    with pytest.raises(ValueError, match=r"(?i)target.modules"):
        get_reft_model(base, reft_config(lora=lora_config(target_modules=["nowhere"])))
    assert [name for name, _ in base.named_modules()] == names
    assert torch.equal(logits(base), logits(tiny_llama()))

    with pytest.raises(TypeError, match="PEFT keeps one method in each"):
        get_peft_model(get_peft_model(tiny_llama(), lora_config()), reft_config())
    with pytest.raises(TypeError, match="this one has a IA3Model"):
        get_reft_model(
            get_peft_model(tiny_llama(), IA3Config(target_modules=["q_proj"], feedforward_modules=[])), reft_config()
        )
    two = get_peft_model(tiny_llama(), lora_config())
    two.add_adapter("second", lora_config())
    with pytest.raises(ValueError, match=r"delete_adapter\(\.\.\.\) the others"):
        get_reft_model(two, reft_config())


def test_weights_without_the_lora_part_are_refused(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    model = both()
    model.save_pretrained(tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    from reftune.tuner.atomic import commit_config

    kept = {k: v for k, v in load_file(file).items() if "layers.0.self_attn.q_proj.lora_A" not in k}
    save_file(kept, file, metadata={"format": "pt"})
    commit_config(tmp_path)
    with pytest.raises(ValueError, match=r"LoRA part of adapter 'default' does not fit: 1 tensors .*q_proj\.lora_A"):
        PeftModel.from_pretrained(tiny_llama(layers=3), tmp_path)
