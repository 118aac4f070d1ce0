"""Several adapters with LoRA parts: added beside others, and called what they may be called."""

from pathlib import Path

import pytest
import torch
from peft import PeftModel

from conftest import tiny_llama
from reftune import get_reft_model
from tuner.test_with_lora import logits, lora_config, randomise, reft_config


def test_adapters_with_lora_parts_are_added_beside_one_with_a_head() -> None:
    model = get_reft_model(tiny_llama(layers=3), reft_config(modules_to_save=["lm_head"]), "head")
    randomise(model)
    with torch.no_grad():
        model.get_base_model().lm_head.modules_to_save["head"].weight.mul_(2)
    before, trains = logits(model), {n for n, p in model.named_parameters() if p.requires_grad}
    for name in ("mixed", "also"):
        model.add_adapter(name, reft_config(lora=lora_config(init_lora_weights=False)))
        assert torch.equal(logits(model), before)
        assert {n for n, p in model.named_parameters() if p.requires_grad} == trains
    randomise(model)
    model.set_adapter("mixed")
    mixed = logits(model)
    model.add_adapter("third", reft_config(lora=lora_config(init_lora_weights=False)))
    assert torch.equal(logits(model), mixed)


@pytest.mark.parametrize("name", ["lora_style", "reft_style"])
def test_an_adapter_may_be_called_like_the_method(name: str, tmp_path: Path) -> None:
    model = get_reft_model(tiny_llama(layers=3), reft_config(lora=lora_config()), name)
    model.add_adapter("plain", reft_config(modules_to_save=["lm_head"]))
    randomise(model)
    model.save_pretrained(tmp_path)
    for saved in (name, "plain"):
        model.set_adapter(saved)
        for loaded_as in (name, "default"):
            loaded = PeftModel.from_pretrained(tiny_llama(layers=3), tmp_path / saved, adapter_name=loaded_as)
            assert torch.equal(logits(loaded), logits(model))


@pytest.mark.parametrize("name", ["self_attn", "q_proj", "lora_A", "base_layer"])
def test_no_adapter_is_called_like_a_module_with_lora(name: str) -> None:
    """The keys of a LoRA part have that module's name in them, and PEFT leaves out keys with another adapter's name."""
    model = get_reft_model(tiny_llama(layers=3), reft_config(), name)
    before = logits(model)
    with pytest.raises(ValueError, match=f"cannot be called '{name}'"):
        model.add_adapter("mixed", reft_config(lora=lora_config()))
    assert list(model.peft_config) == [name]
    assert torch.equal(logits(model), before)
    model = get_reft_model(tiny_llama(layers=3), reft_config(lora=lora_config()))
    with pytest.raises(ValueError, match=f"cannot be called '{name}'"):
        model.add_adapter(name, reft_config())
