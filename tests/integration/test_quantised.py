"""A quantised base: attach, train, save, load. The adapter stays fp32 and learns; the base's weights stay quantised."""

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from tiny_training import Rows, adapter, collate, losses, trainer
from transformers import AutoModelForCausalLM

from conftest import tiny_llama
from reftune import ReftConfig, get_reft_model


def quantisation(kind: str) -> Any:
    if kind.startswith("torchao"):
        pytest.importorskip("torchao")
        from torchao.quantization import Int8WeightOnlyConfig
        from transformers import TorchAoConfig

        return TorchAoConfig(Int8WeightOnlyConfig())
    pytest.importorskip("bitsandbytes")
    from transformers import BitsAndBytesConfig

    if kind == "bitsandbytes-8bit":
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32)


def base(kind: str, directory: Path) -> Any:
    """A small Llama, quantised while it is loaded, as a user would; widths that every kernel takes."""
    if not directory.exists():
        tiny_llama(layers=3, hidden=64).save_pretrained(directory)
    model = AutoModelForCausalLM.from_pretrained(
        directory, quantization_config=quantisation(kind), device_map={"": "cpu"}, dtype=torch.float32
    ).eval()
    if not model.hf_quantizer.is_trainable:
        pytest.skip(f"this transformers does not train on {kind}")
    return model


@pytest.mark.parametrize("component", ["block_output", "mlp_output"])
@pytest.mark.parametrize("kind", ["torchao-int8", "bitsandbytes-4bit", "bitsandbytes-8bit"])
def test_a_quantised_base_trains_and_saved_equals_loaded(kind: str, component: str, tmp_path: Path) -> None:
    model = base(kind, tmp_path / "base")
    config = ReftConfig(r=4, layers="all", component=component, init_weights=False, task_type="CAUSAL_LM")
    model = get_reft_model(model, config)
    before, projection = adapter(model), model.get_base_model().model.layers[0].mlp.down_proj.weight
    assert type(projection.data if kind.startswith("torchao") else projection).__name__ not in ("Tensor", "Parameter")
    assert all(value.dtype == torch.float32 for value in before.values())
    assert {n for n, p in model.named_parameters() if p.requires_grad} == set(before)

    run = trainer(model, tmp_path / "run", max_steps=8, save_strategy="steps", save_steps=4, weight_decay=0.1)
    run.train()
    assert losses(run)[-1] < losses(run)[0]
    after = adapter(model)
    assert any(not torch.equal(after[name], before[name]) for name in after)
    assert not list((tmp_path / "run" / "checkpoint-4").glob("model*"))

    model.save_pretrained(str(tmp_path / "adapter"))
    loaded = PeftModel.from_pretrained(base(kind, tmp_path / "base"), str(tmp_path / "adapter")).eval()
    batch = collate([Rows()[0], Rows()[1]])
    with torch.no_grad():
        assert torch.equal(loaded(**batch).logits, model.eval()(**batch).logits)
        with loaded.disable_adapter():
            assert torch.equal(loaded(**batch).logits, base(kind, tmp_path / "base")(**batch).logits)
    ids = batch["input_ids"][:, :4]
    assert loaded.generate(input_ids=ids, max_new_tokens=3, do_sample=False).shape[0] == 2


def test_trl_casts_the_adapter_of_a_quantised_base_to_bf16_and_it_still_learns(tmp_path: Path) -> None:
    """TRL follows QLoRA there; R in bf16 is made orthonormal where it is used."""
    model = get_reft_model(
        base("torchao-int8", tmp_path / "base"), ReftConfig(r=4, layers="all", task_type="CAUSAL_LM")
    )
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(torch.bfloat16)
    run = trainer(model, tmp_path / "run", max_steps=8)
    run.train()
    assert losses(run)[-1] < losses(run)[0]
    model.save_pretrained(str(tmp_path / "adapter"))
    loaded = PeftModel.from_pretrained(base("torchao-int8", tmp_path / "base"), str(tmp_path / "adapter")).eval()
    batch = collate([Rows()[0]])
    with torch.no_grad():
        torch.testing.assert_close(loaded(**batch).logits, model.eval()(**batch).logits, rtol=1e-3, atol=1e-3)
