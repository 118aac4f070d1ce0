"""`ReftConfig`: defaults, pyreft's form, what is saved is what is loaded, and settings that cannot be meant."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftConfig, PeftModel
from torch import Tensor, nn

from conftest import tiny_llama
from reftune import LoreftIntervention, NodireftIntervention, RedIntervention, ReftConfig, get_reft_model
from reftune.interventions import INTERVENTIONS, Intervention, LowRankIntervention, register_intervention

GIVEN = {"layer": 1, "component": "block_output", "low_rank_dimension": 2}


def interventions(model: nn.Module) -> dict[str, Intervention]:
    """Those of a model by the module they edit."""
    return {
        name.removeprefix("base_model.model.").split(".edit_")[0]: module
        for name, module in model.named_modules()
        if isinstance(module, Intervention)
    }


def roundtrip(config: ReftConfig, directory: Path) -> ReftConfig:
    config.save_pretrained(str(directory))
    return PeftConfig.from_pretrained(str(directory))


# -- defaults ---------------------------------------------------------------------------------------------------------


def test_defaults() -> None:
    config = ReftConfig()
    expected = {
        "r": 4,
        "layers": "mid",
        "positions": "f2+l2",
        "component": "block_output",
        "intervention": "loreft",
        "share_weights": False,
        "act_fn": None,
        "dropout": 0.0,
        "bias": "learned",
        "init_weights": True,
        "intervention_kwargs": {},
        "subspaces": None,
        "stack": None,
        "between": None,
        "nested": False,
        "orthogonal_to": None,
        "lora": None,
        "representations": None,
        "modules_to_save": None,
        "exclude_modules": None,
        "target_modules": None,
        "trainable_token_indices": None,
        "base_model_shape": None,
        "task_type": None,
        "inference_mode": False,
        "peft_type": "REFT",
    }
    assert {key: getattr(config, key) for key in expected} == expected
    assert isinstance(config, PeftConfig)
    assert not config.is_prompt_learning
    assert not config.is_adaption_prompt


def test_configs_do_not_share_their_dicts() -> None:
    first, second = ReftConfig(), ReftConfig()
    first.intervention_kwargs["topk"] = 1
    assert second.intervention_kwargs == {}


# -- intervention: a name, a class, a module --------------------------------------------------------------------------


@pytest.mark.parametrize("kind", sorted(k for k, c in INTERVENTIONS.items() if c.__module__.startswith("reftune.")))
def test_a_kind_may_be_named_or_given_as_a_class(kind: str) -> None:
    assert ReftConfig(intervention=INTERVENTIONS[kind]).to_dict() == ReftConfig(intervention=kind).to_dict()


def test_a_module_brings_its_settings_and_its_weights() -> None:
    module = LoreftIntervention(32, 3, act_fn="gelu", dropout=0.25, bias="frozen", init_weights=False)
    config = ReftConfig(intervention=module, positions="l1")
    settings = (config.intervention, config.r, config.act_fn, config.dropout, config.bias, config.init_weights)
    assert settings == ("loreft", 3, "gelu", 0.25, "frozen", False)
    model = get_reft_model(tiny_llama(), config)
    [built] = interventions(model).values()
    assert built is not module
    assert torch.equal(built.R, module.R)
    assert torch.equal(built.b, module.b)


# -- pyreft's representations -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["dict", "list"])
def test_the_two_lines_of_pyreft(how: str) -> None:
    entry = {**GIVEN, "intervention": LoreftIntervention(embed_dim=32, low_rank_dimension=2, init_weights=False)}
    config = ReftConfig(representations=entry if how == "dict" else [entry])
    assert (config.intervention, config.r, config.share_weights) == ("loreft", 2, True)
    model = get_reft_model(tiny_llama(), config)
    built = interventions(model)
    assert list(built) == ["model.layers.1"]  # one module is one intervention, for all terms of the positions
    assert torch.equal(built["model.layers.1"].W, entry["intervention"].W)


def test_several_representations_of_several_kinds() -> None:
    config = ReftConfig(
        positions="l1",
        representations=[
            {"layer": 0, "intervention": NodireftIntervention(32, 1)},
            {"layer": -1, "intervention": RedIntervention, "component": "mlp_output", "positions": "all"},
            {"layer": 2, "intervention_type": "consreft", "low_rank_dimension": 5},
            {"component": "model.layers[1].self_attn.output", "r": 6},
        ],
    )
    model = get_reft_model(tiny_llama(), config)
    built = interventions(model)
    assert {path: (m.kind, m.low_rank_dimension) for path, m in built.items()} == {
        "model.layers.0": ("nodireft", 1),
        "model.layers.1.self_attn": ("loreft", 6),
        "model.layers.2": ("consreft", 5),
        "model.layers.3.mlp": ("red", None),
    }
    assert [edit["positions"] for edit in config.edits()] == ["l1", "all", "l1", "l1"]


def test_a_raw_path_needs_no_layer() -> None:
    path = "model.layers[2].mlp.down_proj.input"
    module = LoreftIntervention(embed_dim=64, low_rank_dimension=2)
    model = get_reft_model(tiny_llama(), ReftConfig(representations={"component": path, "intervention": module}))
    assert list(interventions(model)) == ["model.layers.2.mlp.down_proj"]


def test_settings_outside_are_for_all_representations() -> None:
    config = ReftConfig(
        r=3, dropout=0.5, intervention="direft", positions="f1", representations=[{"layer": 0}, {"layer": 1, "r": 2}]
    )
    for edit, r in zip(config.edits(), (3, 2), strict=True):
        assert (edit["intervention"], edit["r"], edit["dropout"], edit["positions"]) == ("direft", r, 0.5, "f1")


@pytest.mark.parametrize(
    ("representations", "message"),
    [
        ([], "representations is empty"),
        ({"layers": 3}, r"representations\[0\] has unknown keys \['layers'\]. Known: .*layer, low_rank_dimension"),
        ([{"layer": 1}, {"component": "block_output"}], r"representations\[1\] names no layer and no module path"),
        ({**GIVEN, "intervention": LoreftIntervention(32, 3)}, "says low_rank_dimension=2, but .* has rank 3"),
        ({**GIVEN, "intervention": "lorfet"}, "Unknown intervention 'lorfet'.*Did you mean 'loreft'"),
        ({**GIVEN, "positions": "first2"}, "'first2' in positions='first2' is no position"),
    ],
)
def test_representations_that_cannot_be_meant(representations: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ReftConfig(representations=representations)


# -- saved and loaded -------------------------------------------------------------------------------------------------

CONFIGS = {
    "defaults": lambda: ReftConfig(),
    "everything": lambda: ReftConfig(
        r=2,
        layers=[3, -1],
        positions="f1+gen/64",
        component="mlp_output",
        intervention="nodireft",
        share_weights=True,
        act_fn="gelu",
        dropout=0.1,
        bias="frozen",
        init_weights=False,
        task_type="CAUSAL_LM",
        modules_to_save=["lm_head"],
    ),
    "a depth range": lambda: ReftConfig(layers="50%-70%"),
    "one layer": lambda: ReftConfig(layers=-1),
    "kwargs": lambda: ReftConfig(intervention="reft_r1", intervention_kwargs={"topk": 3}),
    "a module": lambda: ReftConfig(intervention=LoreftIntervention(32, 2, dropout=0.1)),
    "a class": lambda: ReftConfig(intervention=RedIntervention),
    "subspaces": lambda: ReftConfig(r=3, subspaces={"b": 2, "a": 1}, intervention="direft"),
    "a stack": lambda: ReftConfig(stack=[1, 2], between="tanh"),
    "nested": lambda: ReftConfig(r=4, nested=[1, 4]),
    "all ranks nested": lambda: ReftConfig(nested=True),
    "a LoRA part": lambda: ReftConfig(lora=LoraConfig(r=2, target_modules=["v_proj", "q_proj"])),
    "representations of several forms": lambda: ReftConfig(
        representations=[{"layer": 0, "stack": [1, 2]}, {"layer": 1, "r": 2, "subspaces": {"a": 2}}, {"layer": 2}]
    ),
    "pyreft's dict": lambda: ReftConfig(representations={**GIVEN, "intervention": LoreftIntervention(32, 2)}),
    "pyreft's list": lambda: ReftConfig(
        representations=[{"layer": 0}, {"component": "model.layers[1].mlp.output", "intervention": RedIntervention}]
    ),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_saved_equals_loaded(name: str, tmp_path: Path) -> None:
    config = CONFIGS[name]()
    plain = copy.deepcopy(config.to_dict())
    assert json.loads(json.dumps(plain)) == {**plain, "peft_type": "REFT"}
    loaded = roundtrip(config, tmp_path)
    assert type(loaded) is ReftConfig
    assert config.to_dict() == plain  # saving changes nothing
    assert loaded.to_dict() == plain
    again = ReftConfig.from_pretrained(str(tmp_path))
    assert again.to_dict() == loaded.to_dict()
    assert [{**e, "given": None} for e in loaded.edits()] == [{**e, "given": None} for e in config.edits()]


@pytest.mark.parametrize("name", [n for n in CONFIGS if n != "everything"])
def test_a_saved_adapter_is_built_again_from_its_config(name: str, tmp_path: Path) -> None:
    model = get_reft_model(tiny_llama(), CONFIGS[name]())
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
    ids = torch.tensor([[5, 6, 7, 8, 9]])
    with torch.no_grad():
        expected = model.eval()(ids).logits
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny_llama(), tmp_path)
    with torch.no_grad():
        assert torch.equal(loaded.eval()(ids).logits, expected)


def test_an_unknown_key_in_a_file_is_warned_of_and_one_in_python_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="rank"):
        ReftConfig(rank=3)
    ReftConfig(r=3).save_pretrained(str(tmp_path))
    file = tmp_path / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "of_a_later_version": 1}))
    with pytest.warns(UserWarning, match="of_a_later_version"):
        assert PeftConfig.from_pretrained(str(tmp_path)).r == 3


def test_a_kind_of_ones_own_must_be_registered_before_it_is_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("reftune.interventions.base.INTERVENTIONS", registry := dict(INTERVENTIONS))

    @register_intervention("mine")
    class Mine(Intervention):
        has_rank = False
        setting_names = ("start",)

        def reset_parameters(self) -> None:
            self.b = nn.Parameter(torch.full((self.embed_dim,), float(self.settings.get("start", 0))))

        def delta(self, h: Tensor, segments: Tensor | None = None) -> Tensor:
            return self.b.expand_as(h)

    config = ReftConfig(intervention="mine", intervention_kwargs={"start": 2}, positions="l1")
    [built] = interventions(get_reft_model(tiny_llama(), config)).values()
    assert torch.equal(built.b, torch.full((32,), 2.0))
    assert roundtrip(config, tmp_path).intervention_kwargs == {"start": 2}
    del registry["mine"]
    with pytest.raises(ValueError, match=r"Unknown intervention 'mine'.*must be imported"):
        PeftConfig.from_pretrained(str(tmp_path))


# -- one config, two models -------------------------------------------------------------------------------------------


def test_the_users_settings_and_module_are_untouched_by_two_models() -> None:
    module = LoreftIntervention(32, 2)
    config = ReftConfig(intervention=module, layers="mid", positions="f1+l1")
    filled_in = ("target_modules", "base_model_shape", "base_model_name_or_path", "auto_mapping", "inference_mode")
    before = {k: copy.deepcopy(v) for k, v in config.to_dict().items() if k not in filled_in}
    weights = copy.deepcopy(module.state_dict())
    first, second = get_reft_model(tiny_llama(layers=2), config), get_reft_model(tiny_llama(layers=8), config)
    assert set(interventions(first)) == {"model.layers.1"}
    assert set(interventions(second)) == {"model.layers.4"}
    with torch.no_grad():
        for parameter in first.parameters():
            parameter.zero_()
    assert {k: v for k, v in config.to_dict().items() if k not in filled_in} == before
    assert all(torch.equal(value, weights[key]) for key, value in module.state_dict().items())
    assert all(torch.equal(m.W, module.W) for m in interventions(second).values())


def test_each_of_two_models_saves_its_own_shape(tmp_path: Path) -> None:
    config = ReftConfig(layers="mid")
    first = get_reft_model(tiny_llama(layers=2), config)
    get_reft_model(tiny_llama(layers=8, hidden=16), config)
    first.save_pretrained(tmp_path)
    PeftModel.from_pretrained(tiny_llama(layers=2), tmp_path)


# -- settings that cannot be meant ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"r": 0}, "r must be a whole number of at least 1, but is 0"),
        ({"r": 2.5}, "r must be a whole number of at least 1, but is 2.5"),
        ({"positions": "f"}, "'f' in positions='f' is no position"),
        ({"positions": ""}, "positions must be an expression"),
        ({"positions": "f2+f3"}, "two terms 'f'"),
        ({"intervention": "lorfet"}, "Did you mean 'loreft'"),
        ({"intervention": None}, "Unknown intervention None"),
        ({"bias": "all"}, "bias must be .*'all'"),
        ({"r": True}, "r must be a whole number of at least 1, but is True"),
        ({"intervention": LowRankIntervention}, "LowRankIntervention is not a registered intervention"),
        ({"representations": []}, "representations is empty"),
        ({"representations": [3]}, r"representations\[0\] must be a dict .* but is 3"),
        ({"representations": "layer 3"}, "representations must be a dict or a list of dicts, but is 'layer 3'"),
        ({"representations": {"layer": 1, "r": 2, "intervention": LoreftIntervention(8, 4)}}, "r=2, but .* rank 4"),
        ({"representations": {"layer": 1, "rank": 2}}, r"unknown keys \['rank'\]"),
        ({"subspaces": {"a": 2, "b": 3}}, r"divide 5 rows, but r=4: set r=5"),
        ({"subspaces": ["a", "b"]}, "subspaces must be a dict such as"),
        ({"subspaces": {"a": 4}, "nested": True}, "subspaces and nested cannot be had at once"),
        ({"stack": [1, 2], "nested": True}, "stack and nested cannot be had at once"),
        ({"stack": [1, 2], "intervention": "red"}, r"stack=\[1, 2\] needs a kind of the low-rank family"),
        ({"nested": True, "intervention": "postblock"}, "nested=True needs a kind of the low-rank family"),
        ({"stack": "1,2"}, "stack must be a list of ranks"),
        ({"between": "gelu"}, "between='gelu' is a function between the stages of a stack: set stack"),
        ({"stack": [1], "between": "gleu"}, "Unknown act_fn 'gleu'"),
        ({"nested": [5]}, "between 1 and r=4"),
        ({"representations": {"layer": 1, "stack": [0]}}, "stack must be a list of ranks"),
    ],
)
def test_errors_come_with_the_config_where_they_can(settings: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ReftConfig(**settings)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"r": 33}, r"between 1 and the width .*\(32\), but is 33"),
        ({"layers": 4}, "there is no layer 4"),
        ({"layers": None}, "layers=None names no layers"),
        ({"layers": "upper"}, "layers='upper' names no layers"),
        ({"component": "block_ouput"}, "Did you mean 'block_output'"),
        ({"component": "model.layers[9].mlp.output"}, "no module 'model.layers.9.mlp'"),
        ({"act_fn": "rleu"}, "Unknown act_fn 'rleu'"),
        ({"dropout": 1.5}, "dropout is a probability.*1.5"),
        ({"intervention": "reft_r1", "intervention_kwargs": {"tpk": 2}}, "no setting 'tpk'.*topk"),
        ({"intervention": LoreftIntervention(16, 2)}, "width 16, but those at .* have width 32"),
        # the second of two, when the first is built already
        ({"representations": [{"layer": 0}, {"layer": 2, "intervention": LoreftIntervention(16, 2)}]}, "width 16"),
        ({"representations": [{"layer": 0}, {"layer": 0}]}, "same site and positions twice"),
        ({"stack": [1, 40]}, "rank 40 does not fit hidden states of width 32"),
        ({"r": 40, "subspaces": {"a": 20, "b": 20}}, r"between 1 and the width .*\(32\), but is 40"),
        ({"orthogonal_to": ["other"]}, "'other', which this model does not have"),
        ({"lora": "a name"}, "lora must be a peft.LoraConfig or its dict, but is 'a name'"),
    ],
)
def test_what_the_model_must_tell_is_an_error_that_leaves_it_alone(settings: dict, message: str) -> None:
    base = tiny_llama()
    before = [(name, p.requires_grad) for name, p in base.named_parameters()]
    modules = [name for name, _ in base.named_modules()]
    with pytest.raises(ValueError, match=message):
        get_reft_model(base, ReftConfig(**settings))
    assert [name for name, _ in base.named_modules()] == modules
    assert [(name, p.requires_grad) for name, p in base.named_parameters()] == before


# -- several components -----------------------------------------------------------------------------------------------


def test_a_list_of_components_edits_each_with_weights_of_its_own(tmp_path):
    base = tiny_llama()
    config = ReftConfig(component=["attention_input", "mlp_input"], layers=[1, 2], positions="l1", init_weights=False)
    model = get_reft_model(base, config).eval()
    built = interventions(model)
    assert list(built) == [f"model.layers.{i}.{part}" for i in (1, 2) for part in ("self_attn", "mlp")]
    assert len({id(module.W) for module in built.values()}) == 4
    ids = torch.tensor([[5, 6, 7]])
    wanted = model(ids).logits
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(model.unload(), tmp_path).eval()
    assert torch.equal(loaded(ids).logits, wanted)
    assert loaded.peft_config["default"].component == ["attention_input", "mlp_input"]


@pytest.mark.parametrize("component", [[], ["mlp_input", "mlp_input"], [1], None, ("mlp_input",)])
def test_components_that_cannot_be_meant(component):
    with pytest.raises(ValueError, match="component must be a name such as 'block_output', or a list"):
        ReftConfig(component=component)


def test_a_representation_is_one_place():
    with pytest.raises(ValueError, match=r"representations\[0\] is one place, but its component is \['mlp_input'\]"):
        ReftConfig(representations={"layer": 1, "component": ["mlp_input"]})
