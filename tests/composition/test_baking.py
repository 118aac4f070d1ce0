"""A baked adapter computes what the composition computes: over random adapters and families, on every prompt length."""

import random

import pytest
import torch
from peft import PeftModel
from several import MASK, PROMPT, assert_close, draw, logits, several, shake

from families import tiny
from reftune import ReftConfig, get_reft_model
from reftune.composition import adapters, bake, compose
from reftune.interventions import Intervention, NodireftIntervention

FAMILIES = ["llama", "gpt2", "qwen2", "gemma2", "gpt_neox", "mixtral", "falcon", "opt"]


def composed(model, strengths, how="sum"):
    with compose(strengths, how).on(model):
        return logits(model)


def alone(model, adapter):
    with compose({adapter: 1.0}, "sequence").on(model):  # as set_adapter would
        return logits(model)


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("how", ["sum", "sequence"])
def test_baked_equals_composed_in_every_family(name, how):
    rng = random.Random(name + how)
    positions = rng.choice(["f2+l2", "l2", "prompt", "all", "f1+gen"])
    shared = rng.random() < 0.5
    same = {"positions": positions, "share_weights": shared}
    model = several(name, **{x: draw(f"{name}{how}{x}", **same) for x in "abc"})
    strengths = {"a": 1.0, "b": -0.7, "c": 0.4}
    wanted = composed(model, strengths, how)
    baked = bake(model, compose(strengths, how), "new")
    assert baked.error < 1e-6
    assert_close(alone(model, "new"), wanted)
    assert float((wanted - composed(model, {})).abs().max()) > 0.01


@pytest.mark.parametrize("seed", range(30))
@pytest.mark.parametrize("how", ["sum", "sequence"])
def test_random_pairs_bake_exactly_or_say_why(seed, how):
    a, b = draw(f"a{seed}", init_weights=False), draw(f"b{seed}", init_weights=False)
    rng = random.Random(seed)
    if rng.random() < 0.6:  # often alike, as two adapters of one recipe are
        b["positions"], b["share_weights"] = a["positions"], a["share_weights"]
    model = several(a=a, b=b)
    strengths = {"a": rng.uniform(-1.5, 1.5), "b": rng.uniform(-1.5, 1.5)}
    before = composed(model, strengths, how)
    refused = ""
    try:
        bake(model, compose(strengths, how), "new")
    except ValueError as error:
        refused = str(error)
    if not refused:
        assert_close(alone(model, "new"), before)
        return
    alike = a["positions"] == b["positions"] and a["share_weights"] == b["share_weights"]
    assert not alike or a["positions"] == "mid1+l1"  # one token may be both
    assert "reftune.compose" in refused
    assert "new" not in model.peft_config
    assert torch.equal(composed(model, strengths, how), before)


def test_enough_random_pairs_bake():
    """The test above would pass if nothing could be baked."""
    done = 0
    for seed in range(30):
        a, b = draw(f"a{seed}"), draw(f"b{seed}")
        if random.Random(seed).random() < 0.6:
            b["positions"], b["share_weights"] = a["positions"], a["share_weights"]
        try:
            several(a=a, b=b).add_weighted_adapter(["a", "b"], [1.0, 1.0], "new", "sequence")
            done += 1
        except ValueError:
            pass
    assert done >= 20


def test_ranks_add_up_and_each_site_gets_what_it_needs():
    model = several(a={"r": 2, "layers": [1, 2]}, b={"r": 3, "layers": [2, 3]})
    baked = model.add_weighted_adapter(["a", "b"], [1.0, 0.5], "new")
    ranks = {site.split(".")[2]: rank for (site, _), rank in baked.ranks.items()}
    assert ranks == {"1": 2, "2": 5, "3": 3}
    assert str(baked) == "adapter 'new': 6 edits, ranks 2 to 5, exact"
    assert model.active_adapters == ["a"]


def test_a_whole_expression_gets_a_list_of_sites_with_exact_ranks():
    model = several(a={"r": 2, "layers": [1, 2], "positions": "l2"}, b={"r": 3, "layers": [2, 3], "positions": "l2"})
    model.add_weighted_adapter(["a", "b"], [1.0, 0.5], "new")
    config = model.peft_config["new"]
    assert [(e["layer"], e["r"], e["intervention"]) for e in config.representations] == [
        (1, 2, "nodireft"),
        (2, 5, "nodireft"),
        (3, 3, "nodireft"),
    ]


def test_what_can_be_one_expression_is_one():
    model = several(a={"positions": "f2+l2", "r": 2}, b={"positions": "f2+l2+gen", "r": 2, "intervention": "direft"})
    model.add_weighted_adapter(["a", "b"], [1.0, 0.5], "new")
    config = model.peft_config["new"]
    assert (config.positions, config.layers, config.component) == ("f2+l2+gen", [1, 2], "block_output")
    assert_close(alone(model, "new"), composed(model, {"a": 1.0, "b": 0.5}))


@pytest.mark.parametrize(
    "component",
    [
        *("mlp_output", "attention_output", "block_input", "model.layers[2].mlp.output", "mlp.down_proj.input"),
        ["attention_input", "mlp_input"],
    ],
)
def test_other_components(component):
    one = {"component": component, "positions": "l2"}
    model = several(a=one, b={**one, "r": 2}, c={"component": "block_output", "positions": "l2"})
    model.add_weighted_adapter(["a", "b"], [1.0, 0.5], "two")
    assert_close(alone(model, "two"), composed(model, {"a": 1.0, "b": 0.5}))
    model.add_weighted_adapter(["a", "b", "c"], [1.0, 0.5, 2.0], "three")
    assert_close(alone(model, "three"), composed(model, {"a": 1.0, "b": 0.5, "c": 2.0}))


def test_a_sequence_keeps_overlapping_edits_apart_and_a_sum_refuses_them():
    model = several(a={"positions": "prompt"}, b={"positions": "all"}, c={"positions": "prompt"})
    model.add_weighted_adapter(["a", "b"], [1.0, 0.5], "new", "sequence")
    assert_close(alone(model, "new"), composed(model, {"a": 1.0, "b": 0.5}, "sequence"))
    with pytest.raises(ValueError, match=r"not the same but overlap.*reftune.compose"):
        model.add_weighted_adapter(["a", "b"], [1.0, 0.5], "sum")
    with pytest.raises(ValueError, match="another edit comes between the two"):
        model.add_weighted_adapter(["a", "b", "c"], [1.0, 0.5, 1.0], "other", "sequence")


def test_no_room_in_one_config_is_said():
    model = several(a={"positions": "f2+l2"}, b={"positions": "f2+l2", "component": "mlp_output"})
    with pytest.raises(ValueError, match="no room for"):
        model.add_weighted_adapter(["a", "b"], [1.0, 0.5], "new")
    assert list(model.peft_config) == ["a", "b"]


@pytest.mark.parametrize("how", ["sum", "sequence"])
def test_red_bakes_with_red_only(how):
    red = {"intervention": "red", "component": "mlp_output", "positions": "all"}
    model = several(a=red, b={**red, "layers": [0, 2]}, c={"component": "mlp_output", "positions": "all"})
    baked = model.add_weighted_adapter(["a", "b"], [1.0, 0.5], "new", how)
    assert model.peft_config["new"].intervention == "red"
    assert baked.error == 0
    assert_close(alone(model, "new"), composed(model, {"a": 1.0, "b": 0.5}, how))
    with pytest.raises(ValueError, match="scales every dimension"):
        model.add_weighted_adapter(["a", "c"], [1.0, 0.5], "other", how)
    with pytest.raises(ValueError, match="has no rank"):
        model.add_weighted_adapter(["a", "b"], [1.0, 0.5], "other", how, rank=2)


def test_red_without_an_edit_at_some_site_leaves_it_as_it_is():
    red = {"intervention": "red"}
    model = several(a={**red, "positions": "prompt", "layers": [1]}, b={**red, "positions": "gen", "layers": [2]})
    model.add_weighted_adapter(["a", "b"], [1.0, 1.0], "new")
    assert (model.peft_config["new"].positions, model.peft_config["new"].layers) == ("prompt+gen", [1, 2])
    assert_close(alone(model, "new"), composed(model, {"a": 1.0, "b": 1.0}))


def test_functions():
    model = several(
        a={"intervention": "direft", "act_fn": "silu"},
        b={"intervention": "nodireft", "act_fn": "silu", "r": 2},
        c={"intervention": "postblock"},
        d={"intervention": "nodireft", "act_fn": "relu"},
        x={"intervention": "loreft"},
        y={"intervention": "reft_r1"},
    )
    model.add_weighted_adapter(["a", "b", "c"], [1.0, 0.5, -1.0], "new")
    assert_close(alone(model, "new"), composed(model, {"a": 1.0, "b": 0.5, "c": -1.0}))
    for other, how, why in [
        ("d", "sum", "silu and the other relu"),
        ("x", "sum", "silu and the other identity"),
        ("b", "sequence", "act_fn"),
        ("y", "sum", "couples"),
    ]:
        with pytest.raises(ValueError, match=why):
            model.add_weighted_adapter(["a", other], [1.0, 1.0], "other", how)
    assert "other" not in model.peft_config


def test_a_lower_rank_is_the_nearest_and_its_error_is_told():
    same = {"positions": "all", "layers": [1, 2], "r": 3}
    model = several(a=same, b=same)
    wanted = composed(model, {"a": 1.0, "b": 0.5})
    errors = {}
    for rank in (1, 3, 5, 6):
        baked = model.add_weighted_adapter(["a", "b"], [1.0, 0.5], f"r{rank}", rank=rank)
        assert set(baked.ranks.values()) == {rank}
        errors[rank] = (baked.error, float((alone(model, f"r{rank}") - wanted).norm()))
    assert errors[6][0] == 0
    assert errors[1] > errors[3] > errors[5] > errors[6]  # both numbers
    assert "largest relative error" in str(model.add_weighted_adapter(["a", "b"], [1.0, 0.5], "x", rank=2))
    model.add_weighted_adapter(["a", "b"], [1.0, 0.5], "more", rank=20)  # at most
    assert model.peft_config["more"].r == 6


def test_a_weight_of_zero_leaves_an_adapter_out():
    model = several(a={"r": 2}, b={"r": 3, "layers": [0]})
    baked = model.add_weighted_adapter(["a", "b"], [1.0, 0.0], "new")
    assert {site.split(".")[2] for site, _ in baked.ranks} == {"1", "2"}
    assert set(baked.ranks.values()) == {2}
    assert_close(alone(model, "new"), alone(model, "a"))


def test_more_rows_than_dimensions():
    same = {"r": 20, "positions": "l2"}
    model = several(a=same, b={**same, "intervention": "nodireft"})
    baked = model.add_weighted_adapter(["a", "b"], [1.0, 0.5], "new")
    assert set(baked.ranks.values()) == {32}
    assert baked.error < 1e-12
    assert_close(alone(model, "new"), composed(model, {"a": 1.0, "b": 0.5}))


def test_the_part_outside_the_rows_is_untouched():
    """h − h' lies in the span of the stacked rows: what is orthogonal to them comes out as it went in."""
    same = {"layers": [2], "positions": "all", "r": 3}
    model = several(a=same, b={**same, "intervention": "nodireft"})
    model.add_weighted_adapter(["a", "b"], [1.0, 0.5], "new")
    layer = model.get_base_model().model.layers[2].edit_output
    rows = torch.cat([layer.reft_all[name].R.double() for name in "ab"])
    outside = torch.eye(32, dtype=torch.float64) - torch.linalg.pinv(rows) @ rows
    seen = []
    handle = layer.register_forward_hook(lambda module, args, output: seen.append((args[0], output)))
    for strengths, how in [({"a": 1.0, "b": 0.5}, "sum"), ({"a": 1.0, "b": 0.5}, "sequence"), ({"new": 1.0}, "sum")]:
        composed(model, strengths, how)
    handle.remove()
    for h, edited in seen:
        torch.testing.assert_close(h @ outside, edited @ outside, atol=1e-6, rtol=0)
        assert float((h - edited)[MASK.bool()].norm(dim=-1).min()) > 0.01


def test_it_is_an_adapter_like_any_other(tmp_path):
    mix = {"one": 1.0, "two": 0.5}
    model = several(one={"r": 2}, two={"r": 3, "layers": [2, 3]})
    wanted = composed(model, mix)
    model.add_weighted_adapter(["one", "two"], [1.0, 0.5], "new")
    model.save_pretrained(tmp_path, selected_adapters=["new"])
    loaded = PeftModel.from_pretrained(tiny("llama"), tmp_path / "new").eval()
    assert_close(logits(loaded), wanted)
    ids = PROMPT[:1]
    with compose(mix).on(model):
        expected = model.generate(ids, attention_mask=MASK[:1], max_new_tokens=5, do_sample=False)
    assert torch.equal(loaded.generate(ids, attention_mask=MASK[:1], max_new_tokens=5, do_sample=False), expected)
    model.delete_adapter("new")
    assert_close(composed(model, mix), wanted)
    twin = PeftModel.from_pretrained(tiny("llama"), tmp_path / "new", is_trainable=True)
    twin(input_ids=ids, labels=ids.masked_fill(torch.arange(7) < 4, -100)).loss.backward()
    grads = [m.W.grad for m in twin.modules() if isinstance(m, NodireftIntervention)]
    assert any(g is not None and bool(g.any()) for g in grads)


def test_bf16_bases_take_baked_adapters():
    base = tiny("llama").to(torch.bfloat16)
    model = get_reft_model(base, ReftConfig(layers=[1], r=2, positions="l2", init_weights=False), adapter_name="a")
    model.add_adapter("b", ReftConfig(layers=[1], r=2, positions="l2", init_weights=False))
    shake(model, "a"), shake(model, "b", 1)
    model.eval().add_weighted_adapter(["a", "b"], [1.0, 1.0], "new")
    assert {p.dtype for m in model.modules() if isinstance(m, Intervention) for p in m.parameters()} == {torch.float32}
    found, wanted = alone(model, "new"), composed(model, {"a": 1.0, "b": 1.0})
    torch.testing.assert_close(found, wanted, atol=0.1, rtol=0.1)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((["a", "x"], [1, 1], "new"), r"There is no adapter 'x'; this model has \['a', 'b'\]"),
        ((["a"], [1, 2], "new"), "one weight for each adapter"),
        (([], [], "new"), "one weight for each adapter"),
        ((["a", "a"], [1, 2], "new"), "named twice"),
        ((["a", "b"], [1, 2], "b"), "'b' already"),
        ((["a", "b"], [1, float("nan")], "new"), "must be a finite number, but is nan"),
        ((["a", "b"], [1, True], "new"), "must be a finite number, but is True"),
        ((["a", "b"], [0, 0], "new"), "All weights are 0"),
        ((["a", "b"], [1, 1], "new", "cat"), "must be 'sum' or 'sequence', but is 'cat'. That is 'sum' here."),
        ((["a", "b"], [1, 1], "new", "ties"), "must be 'sum' or 'sequence', but is 'ties'."),
        ((["a", "b"], [1, 1], "new", "sum", 0), "rank must be a whole number of at least 1"),
    ],
)
def test_bad_input_is_said_and_nothing_is_added(arguments, message):
    model = several(a={}, b={})
    with pytest.raises(ValueError, match=message):
        model.add_weighted_adapter(*arguments)
    assert list(model.peft_config) == ["a", "b"]


@pytest.mark.parametrize("kind", [{"modules_to_save": ["lm_head"]}, {"trainable_token_indices": [5, 9]}])
def test_modules_trained_whole_are_refused(kind):
    model = several(a={}, b=kind)
    with pytest.raises(ValueError, match=r"trained .*(lm_head|tokens)"):
        model.add_weighted_adapter(["a", "b"], [1, 1], "new")


def test_a_handle_bakes_too():
    model = several(a={}, b={})
    a, b = adapters(model, "a", "b")
    wanted = composed(model, {"a": 2.0, "b": -1.0})
    bake(model, 2 * a - b, "new")
    assert_close(alone(model, "new"), wanted)


@pytest.mark.parametrize("form", [{"stack": [1, 2]}, {"subspaces": {"x": 1, "y": 2}}, {"nested": True}])
def test_stacks_subspaces_and_nested_ranks(form):
    same = {"positions": "l2", "r": 3, "layers": [1]}
    model = several(a={**same, **form}, b=same)
    for how in ("sum", "sequence"):
        baked = model.add_weighted_adapter(["a", "b"], [1.0, 0.5], how, how)
        assert set(baked.ranks.values()) == {6}
        assert_close(alone(model, how), composed(model, {"a": 1.0, "b": 0.5}, how))


def test_adapters_out_of_each_others_way_bake_to_the_same_in_any_order():
    same = {"positions": "all", "r": 3, "layers": [1, 2]}
    model = several(a=same, b={**same, "orthogonal_to": ["a"]})
    model.add_weighted_adapter(["a", "b"], [1.0, 0.5], "sum")
    model.add_weighted_adapter(["b", "a"], [0.5, 1.0], "sequence", "sequence")
    assert_close(alone(model, "sum"), composed(model, {"a": 1.0, "b": 0.5}, "sequence"))
    assert_close(alone(model, "sequence"), alone(model, "sum"))
