"""The two lines, pyreft's form and PEFT's, on a model of the article's width."""

import pytest
import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model

from conftest import tiny_llama
from reftune import LoreftIntervention, NodireftIntervention, ReftConfig, get_reft_model

IDS = torch.tensor([[5, 6, 7, 8, 9]])


def test_the_two_lines_as_they_stand():
    from transformers import LlamaConfig, LlamaForCausalLM

    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig(vocab_size=32000))  # Llama-2-7B's shape
    config = ReftConfig(
        representations={
            "layer": 19,
            "component": "block_output",
            "intervention": LoreftIntervention(embed_dim=model.config.hidden_size, low_rank_dimension=4),
        }
    )
    model = get_reft_model(model, config)
    assert str(model.trainable_parameters()) == "32,772 parameters, 65.5 kB in bfloat16, 0.0005% of the model"
    assert isinstance(model, PeftModel)


def test_they_train_with_the_plain_trainer_and_generate(tmp_path):
    model = tiny_llama()
    config = ReftConfig(
        representations={
            "layer": 2,
            "component": "block_output",
            "intervention": LoreftIntervention(embed_dim=model.config.hidden_size, low_rank_dimension=4),
        }
    )
    model = get_reft_model(model, config)
    data = [{"input_ids": [5, 6, 7, 8, 9], "labels": [-100, -100, -100, 8, 9]} for _ in range(4)]
    arguments = transformers.TrainingArguments(
        tmp_path, max_steps=80, learning_rate=0.05, report_to=[], save_strategy="no", disable_tqdm=True, use_cpu=True
    )
    trainer = transformers.Trainer(model=model, args=arguments, train_dataset=data)
    before = trainer.evaluate(data)["eval_loss"]
    trainer.train()
    assert trainer.evaluate(data)["eval_loss"] < before - 0.3
    out = model.generate(torch.tensor([[5, 6, 7]]), max_new_tokens=2, do_sample=False)
    assert out.shape == (1, 5)


def test_the_native_form_and_its_defaults():
    model = get_peft_model(tiny_llama(), ReftConfig(r=4, layers="mid", positions="f2+l2"))
    assert isinstance(model, PeftModel)
    assert model.trainable_parameters().count == 2 * (2 * 4 * 32 + 4)  # one intervention a term
    assert [n for n, p in model.named_parameters() if p.requires_grad] == [
        f"base_model.model.model.layers.2.edit_output.reft_{t}.default.{k}"
        for t in ("f2", "l2")
        for k in ("R", "W", "b")
    ]
    tied = get_peft_model(tiny_llama(), ReftConfig(r=4, share_weights=True))
    assert tied.trainable_parameters().count == 2 * 4 * 32 + 4


def test_several_representations_of_different_kinds():
    base = tiny_llama()
    config = ReftConfig(
        representations=[
            {"layer": 1, "intervention": LoreftIntervention(32, 2), "positions": "f1"},
            {"layer": 3, "component": "mlp_output", "intervention": NodireftIntervention(32, 3), "positions": "l1"},
            {"component": "model.layers[0].output", "intervention": "red", "positions": "all"},
        ]
    )
    model = get_reft_model(base, config)
    assert model.trainable_parameters().count == (2 * 2 * 32 + 2) + (2 * 3 * 32 + 3) + 64
    given = LoreftIntervention(32, 2)
    with torch.no_grad():
        given.b.fill_(0.7)
    model = get_reft_model(tiny_llama(), ReftConfig(representations={"layer": 1, "intervention": given}))
    module = model.get_submodule("base_model.model.model.layers.1.edit_output.reft_f2+l2.default")
    assert torch.equal(module.b, given.b)
    assert module is not given


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"layers": [99]}, "no layer 99"),
        ({"layers": "first"}, "names no layers"),
        ({"component": "mlp_outputs"}, "Did you mean 'mlp_output'"),
        ({"component": "model.layers.9.output"}, "has no module 'model.layers.9'"),
        ({"r": 33}, "between 1 and the width"),
        ({"representations": {"layer": 0, "intervention": LoreftIntervention(16, 2)}}, "width 16.*width 32"),
        ({"component": "model.layers[0].output", "layers": "all", "r": 33}, "between 1 and the width"),
    ],
)
def test_what_does_not_fit_is_refused_and_leaves_the_model_as_it_was(settings, message):
    base = tiny_llama()
    before = [n for n, _ in base.named_modules()]
    with pytest.raises(ValueError, match=message):
        get_reft_model(base, ReftConfig(**settings))
    assert [n for n, _ in base.named_modules()] == before
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in base.modules())
    ids = torch.tensor([[5, 6, 7]])
    with torch.no_grad():
        assert torch.equal(base(ids).logits, tiny_llama()(ids).logits)


def test_a_config_may_be_used_for_two_models():
    config = ReftConfig(r=2)
    get_reft_model(tiny_llama(), config)
    model = get_reft_model(tiny_llama(layers=6, hidden=16), config)
    assert any("layers.3.edit_output" in n for n, _ in model.named_modules())


def test_get_reft_model_takes_its_own_config_only():
    from peft import LoraConfig

    with pytest.raises(TypeError, match="ReftConfig, but got a LoraConfig"):
        get_reft_model(tiny_llama(), LoraConfig())


@pytest.mark.filterwarnings("ignore:You are trying to modify a model with PEFT for a second time")
@pytest.mark.filterwarnings("ignore:Already found a `peft_config` attribute in the model")
@pytest.mark.parametrize("layers", [[1], [2]])
def test_a_second_adapter_of_the_same_name_is_refused_and_the_first_one_stays(layers):
    base = tiny_llama()
    model = get_reft_model(base, ReftConfig(layers=[1], positions="f2", init_weights=False)).eval()
    before = model(IDS).logits
    with pytest.raises(ValueError, match="has a ReFT adapter 'default' already"):
        get_reft_model(base, ReftConfig(layers=layers, positions="l2"))
    assert torch.equal(model(IDS).logits, before)
    assert (model.peft_config["default"].layers, model.peft_config["default"].positions) == ([1], "f2")
    get_reft_model(model.unload(), ReftConfig(layers=layers, positions="l2"))


@pytest.mark.filterwarnings("ignore:You are trying to modify a model with PEFT for a second time")
@pytest.mark.parametrize(
    "again",
    [
        lambda model, path: get_reft_model(model, ReftConfig()),
        lambda model, path: get_peft_model(model, ReftConfig(layers=[2])),
        lambda model, path: PeftModel.from_pretrained(model, path),
    ],
    ids=["get_reft_model", "get_peft_model", "from_pretrained"],
)
def test_a_model_with_an_adapter_taken_for_a_base_stays_as_it_was(again, tmp_path):
    model = get_reft_model(tiny_llama(), ReftConfig(layers=[1], positions="f2", init_weights=False)).eval()
    model.save_pretrained(tmp_path)
    before = model(IDS).logits
    with pytest.raises(TypeError, match=r"already, and PEFT keeps one method in each\. Add to it by add_adapter"):
        again(model, tmp_path)
    assert torch.equal(model(IDS).logits, before)
    assert model.peft_config["default"].layers == [1]
    lora = get_peft_model(tiny_llama(), LoraConfig(target_modules=["q_proj"]))
    with pytest.raises(TypeError, match="For ReFT on a LoRA adapter"):
        get_peft_model(lora, ReftConfig())
    assert isinstance(lora.peft_config["default"], LoraConfig)


@pytest.mark.filterwarnings("ignore:You are trying to modify a model with PEFT for a second time:UserWarning")
@pytest.mark.parametrize("config", [{"positions": "l2"}, {"layers": [0]}, {"positions": "f1"}])
def test_a_second_time_on_one_base_is_refused_and_leaves_the_first(config):
    base, ids = tiny_llama(), torch.tensor([[5, 6, 7, 8, 9]])
    plain = base(input_ids=ids).logits
    first = get_reft_model(base, ReftConfig(r=2, layers=[1], positions="l2", init_weights=False)).eval()
    told, edited = first.peft_config["default"], first(input_ids=ids).logits
    with pytest.raises(ValueError, match=r"has a ReFT adapter 'default' already.*unload"):
        get_reft_model(base, ReftConfig(r=2, **config))
    assert first.peft_config["default"] is told
    assert torch.equal(first(input_ids=ids).logits, edited)
    again = get_reft_model(first.unload(), ReftConfig(r=2, **config)).eval()
    assert torch.equal(again(input_ids=ids).logits, plain)
