"""Weights that do not fit are refused with nothing lost: of a new adapter, and under a name that is there."""

import warnings

import pytest
import torch
from peft import PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tests.tuner.test_peft_contract import IDS, adapted, logits

from conftest import tiny_llama
from reftune import ReftConfig
from reftune.tuner.layer import ReftLayer


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("low", [True, False])
def test_a_file_in_half_precision_is_loaded_as_adapters_are_made(low, dtype, tmp_path):
    first = adapted()
    first.save_pretrained(tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    with safe_open(file, "pt") as opened:
        metadata = opened.metadata()
    save_file({key: value.bfloat16() for key, value in load_file(file).items()}, file, metadata=metadata)
    model = PeftModel.from_pretrained(tiny_llama(dtype=dtype), tmp_path, low_cpu_mem_usage=low)
    model.load_adapter(tmp_path, "other", low_cpu_mem_usage=low)
    edits = [parameter for name, parameter in model.named_parameters() if ".reft_" in name]
    assert {(p.dtype, p.device.type) for p in edits} == {(dtype, "cpu")}  # of the base, where there is a GPU, too
    torch.testing.assert_close(logits(model.eval()).float(), logits(first), atol=1e-2, rtol=1e-2)


def test_weights_that_are_not_the_adapters_are_refused(tmp_path):
    adapted().save_pretrained(tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    whole = load_file(file)
    for change, message in (
        (lambda s: s.pop(next(iter(s))), "1 missing"),
        (
            lambda s: s.update({"base_model.model.model.layers.3.edit_output.reft_f2.R": torch.zeros(4, 32)}),
            "not known",
        ),
        (lambda s: s.update({next(k for k in s if k.endswith("W")): torch.zeros(4, 16)}), "another shape"),
    ):
        state = dict(whole)
        change(state)
        save_file(state, file, metadata={"format": "pt"})
        base = tiny_llama()
        with pytest.raises(ValueError, match=message):
            PeftModel.from_pretrained(base, tmp_path)
        assert not any(isinstance(m, ReftLayer) for m in base.modules())
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert torch.equal(logits(base), tiny_llama()(IDS).logits)


def test_a_base_whose_load_was_refused_is_as_it_was(tmp_path):
    adapted(modules_to_save=["lm_head"]).save_pretrained(tmp_path / "good")
    adapted(modules_to_save=["lm_head"]).save_pretrained(tmp_path / "bad")
    file = tmp_path / "bad" / "adapter_model.safetensors"
    with safe_open(file, framework="pt") as old:
        metadata = old.metadata()
    save_file({key: tensor for key, tensor in load_file(file).items() if "layers.1" not in key}, file, metadata)
    base = tiny_llama()
    before = {module: (type(module), dict(module._modules)) for module in base.modules()}
    names = set(vars(base))
    for load, message in (
        (lambda: PeftModel.from_pretrained(base, tmp_path / "bad"), "6 missing"),
        (lambda: get_peft_model(base, ReftConfig(layers=[99])), "99"),
        (lambda: get_peft_model(base, ReftConfig(modules_to_save=["no_such_module"])), "no_such_module"),
    ):
        with pytest.raises(ValueError, match=message):
            load()
        assert {module: (type(module), dict(module._modules)) for module in base.modules()} == before
        assert set(vars(base)) == names
    assert torch.equal(logits(base), tiny_llama()(IDS).logits)
    loaded = PeftModel.from_pretrained(base, tmp_path / "good")  # without a warning
    assert torch.equal(logits(loaded), logits(PeftModel.from_pretrained(tiny_llama(), tmp_path / "good")))


def test_weights_refused_for_an_adapter_that_is_there_leave_it_as_it_was(tmp_path):
    adapted(r=2).save_pretrained(tmp_path / "smaller")
    adapted(intervention="direft").save_pretrained(tmp_path / "direft")
    adapted(r=2, act_fn="gelu").save_pretrained(tmp_path / "gelu")
    again = adapted()
    again.save_pretrained(tmp_path / "again")
    model = adapted()
    before, state = logits(model), get_peft_model_state_dict(model)
    for file, message in (("smaller", "another shape"), ("direft", "is direft"), ("gelu", "is loreft act_fn='gelu'")):
        with pytest.raises(ValueError, match=message):
            model.load_adapter(tmp_path / file, "default")
        assert torch.equal(logits(model), before)
    with pytest.raises(ValueError, match="missing"):
        set_peft_model_state_dict(model, {})
    beside = {f"{key.removesuffix('.R')}.others_write": torch.eye(32)[:1] for key in state if key.endswith(".R")}
    with pytest.raises(ValueError, match="missing"):
        set_peft_model_state_dict(model, beside)
    assert torch.equal(logits(model), before)
    assert get_peft_model_state_dict(model).keys() == state.keys()
    model.load_adapter(tmp_path / "again", "default")
    assert torch.equal(logits(model), logits(again))
    with pytest.raises(ValueError, match="missing"):  # loaded from a file, it stays too
        set_peft_model_state_dict(PeftModel.from_pretrained(tiny_llama(), tmp_path / "again"), {})


def test_a_damaged_weights_file_is_named(tmp_path):
    adapted().save_pretrained(tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    for damaged in (file.read_bytes()[:200], b""):
        file.write_bytes(damaged)
        with pytest.raises(ValueError, match=r"adapter_model\.safetensors cannot be read: .* save it again"):
            PeftModel.from_pretrained(tiny_llama(), tmp_path)


def test_an_adapter_trained_with_a_files_config_survives_weights_that_are_refused(tmp_path):
    adapted().save_pretrained(tmp_path / "start")
    adapted(r=2).save_pretrained(tmp_path / "smaller")
    adapted(intervention="direft").save_pretrained(tmp_path / "direft")
    config = ReftConfig.from_pretrained(tmp_path / "start")
    config.inference_mode = False
    model = get_peft_model(tiny_llama(), config)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    model.train()(IDS, labels=torch.tensor([[-100, -100, -100, 8, 9]])).loss.backward()
    optimizer.step()
    trained = logits(model.eval())
    for file, message in (("smaller", "another shape"), ("direft", "is direft")):
        with pytest.raises(ValueError, match=message):
            model.load_adapter(tmp_path / file, "default")
        assert torch.equal(logits(model), trained)
