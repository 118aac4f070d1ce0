"""What a user of another method would write in a `ReftConfig` is refused there, and not passed over."""

import pytest

from conftest import tiny_llama
from reftune import ReftConfig, get_reft_model


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"target_modules": ["q_proj"]}, r"target_modules=\['q_proj'\] is not how ReFT is placed: say layers"),
        ({"target_modules": "all-linear"}, "target_modules='all-linear'"),
        ({"exclude_modules": ["model.layers.0"]}, "exclude_modules="),
        ({"init_weights": "gaussian"}, "init_weights must be True or False, but is 'gaussian'"),
        ({"share_weights": "yes"}, "share_weights must be True or False, but is 'yes'"),
    ],
)
def test_what_other_methods_take_is_refused_and_not_passed_over(settings, said):
    with pytest.raises(ValueError, match=said):
        ReftConfig(**settings)


def test_one_module_to_save_may_be_named_alone():
    assert ReftConfig(modules_to_save="lm_head").modules_to_save == ["lm_head"]
    model = get_reft_model(tiny_llama(), ReftConfig(modules_to_save="lm_head"))
    whole = [name for name, p in model.named_parameters() if p.requires_grad and ".reft_" not in name]
    assert whole == ["base_model.model.lm_head.modules_to_save.default.weight"]


def test_a_module_to_save_that_is_not_there_is_refused():
    base = tiny_llama()
    with pytest.raises(ValueError, match=r"modules_to_save names 'lm_haed', .*\(model, lm_head"):
        get_reft_model(base, ReftConfig(modules_to_save=["lm_haed"]))
    assert all(p.requires_grad for p in base.parameters())
