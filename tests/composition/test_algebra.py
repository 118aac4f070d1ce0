"""`style + 0.5 * tone`: what it means, when it is on, and what it refuses."""

import copy
import importlib
import pickle
import threading

import pytest
import torch
from several import logits, several

from reftune.composition import Composition, adapters, bake, compose, current, strength


@pytest.fixture
def model():
    return several(style={"r": 2}, tone={"r": 3, "layers": [2, 3], "positions": "l2"})


@pytest.fixture
def handles(model):
    return adapters(model, "style", "tone")


def test_the_algebra_is_that_of_strengths(handles):
    style, tone = handles
    assert style + 0.5 * tone == compose({"style": 1.0, "tone": 0.5})
    assert tone * 0.5 + style == compose({"style": 1.0, "tone": 0.5})  # a sum has no order
    assert style + tone - tone == compose({"style": 1.0, "tone": 0.0})
    assert -(style - 2 * tone) == compose({"style": -1.0, "tone": 2.0})
    assert style + style == 2 * style
    assert style >> 0.5 * tone == compose({"style": 1.0, "tone": 0.5}, how="sequence")
    assert style >> tone != tone >> style
    assert style + tone != style >> tone
    assert hash(style + tone) == hash(tone + style)
    assert repr(style + 0.5 * tone) == "style + 0.5 * tone"
    assert repr(tone >> style) == "tone >> style"
    assert (style == "style") is False


def test_what_is_on_is_what_was_asked_for(model, handles):
    style, tone = handles
    plain, first = logits(model.get_base_model()), logits(model)
    with model.disable_adapter():
        base = logits(model)
    with (style + tone).on(model):
        both = logits(model)
        with (style >> tone).on(model):
            sequence = logits(model)
        assert torch.equal(logits(model), both)
    assert torch.equal(plain, first)  # the first adapter is the active one
    assert torch.equal(logits(model), first)
    model.base_model.set_adapter(["style", "tone"])
    torch.testing.assert_close(logits(model), sequence)
    assert not torch.allclose(both, sequence)
    with compose({"style": 0.0, "tone": 0}).on(model):
        assert torch.equal(logits(model), base)
    with (0.0 * style + tone).on(model):
        alone = logits(model)
    model.set_adapter("tone")
    torch.testing.assert_close(logits(model), alone)


def test_apply_and_remove(model, handles):
    style, tone = handles
    before = logits(model)
    mix = style - 0.5 * tone
    mix.apply(model)
    applied = logits(model)
    with mix.on(model):
        assert torch.equal(logits(model), applied)
    assert current(model) == mix
    bake(model, style, "baked")
    assert current(model) == mix  # another adapter changes nothing
    mix.remove(model)
    assert torch.equal(logits(model), before)
    assert current(model) == compose({"style": 1.0}, "sequence")
    mix.apply(model)
    model.set_adapter("style")  # this ends it too
    assert torch.equal(logits(model), before)


def test_an_error_in_the_block_ends_it(model, handles):
    before = logits(model)
    with pytest.raises(KeyError), handles[1].on(model):
        raise KeyError
    assert torch.equal(logits(model), before)


def test_a_block_is_of_its_thread(model, handles):
    before = logits(model)
    inside, seen = threading.Event(), []

    def other():
        inside.wait(10)
        seen.append(logits(model))

    thread = threading.Thread(target=other)
    thread.start()
    with handles[1].on(model):
        inside.set()
        thread.join()
    assert torch.equal(seen[0], before)


def test_strength_per_call(model, handles):
    style, tone = handles
    with (0.5 * style).on(model):
        half = logits(model)
    with strength(model, {"style": 0.5}):
        torch.testing.assert_close(logits(model), half)
    with (style + 0.3 * tone).on(model):
        wanted = logits(model)
    (style + tone).apply(model)
    with strength(model, {"tone": 0.3}):
        assert torch.equal(logits(model), wanted)
        with strength(model, {"style": 0}):
            assert current(model) == compose({"style": 0.0, "tone": 0.3})
    assert current(model) == style + tone


def test_a_strength_of_zero_is_the_base_bit_for_bit(model, handles):
    with model.disable_adapter():
        base = logits(model)
    for how in ("sum", "sequence"):
        with compose({"style": 0.0}, how).on(model):
            assert torch.equal(logits(model), base)
    with strength(model, {"style": 0.0}):
        assert torch.equal(logits(model), base)


def test_generation_follows(model, handles):
    style, tone = handles
    ids = torch.tensor([[5, 6, 7, 8]])

    def generate():
        return model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=6, do_sample=False)

    with (style + 2 * tone).on(model):
        inside = generate()
        uncached = model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=6, do_sample=False, use_cache=False
        )
    assert torch.equal(inside, uncached)
    (style + 2 * tone).apply(model)
    assert torch.equal(generate(), inside)
    Composition.remove(model)
    assert not torch.equal(generate(), inside)


def test_what_is_refused(model, handles):
    style, tone = handles
    third = several(style={}, tone={})
    with pytest.raises(ValueError, match="must be a finite number, but is nan"):
        compose({"style": float("nan")})
    with pytest.raises(ValueError, match="must be a finite number, but is 'much'"):
        compose({"style": "much"})
    with pytest.raises(ValueError, match="must be a finite number, but is inf"):
        style * float("inf")
    with pytest.raises(ValueError, match='how must be "sum" or "sequence"'):
        compose({"style": 1.0}, how="product")
    with pytest.raises(ValueError, match=r"There is no adapter 'x'; this model has \['style', 'tone'\]"):
        adapters(model, "style", "x")
    with pytest.raises(ValueError, match="There is no adapter 'x'"), compose({"x": 1.0}).on(model):
        pass
    with pytest.raises(ValueError, match="There is no adapter 'x'"), strength(model, {"x": 1.0}):
        pass
    with pytest.raises(ValueError, match="two models"):
        style + adapters(third, "tone")[0]
    with pytest.raises(ValueError, match="of another model"):
        style.apply(third)
    with pytest.raises(ValueError, match="is a sequence, and a sum cannot hold it"):
        (style >> tone) + style
    with pytest.raises(ValueError, match="is a sequence, which has no multiple"):
        2 * (style >> tone)
    with pytest.raises(ValueError, match="is a sum, and a sequence cannot hold it"):
        (style + tone) >> style
    with pytest.raises(ValueError, match="comes twice"):
        style >> style
    with pytest.raises(TypeError):
        style + 1
    with pytest.raises(TypeError):
        style * "2"
    with pytest.raises(TypeError, match="LlamaForCausalLM"):
        compose({"style": 1.0}).apply(model.get_base_model())
    with pytest.raises(AttributeError):
        style.how = "sequence"
    with pytest.raises(TypeError):
        style.strengths["tone"] = 1.0
    assert current(model) == compose({"style": 1.0}, "sequence")


@pytest.mark.parametrize("kind", [{"modules_to_save": ["lm_head"]}, {"trainable_token_indices": [5, 9]}])
def test_an_adapter_with_modules_of_its_own_must_be_the_active_one(kind):
    model = several(style={}, tone=kind)
    with pytest.raises(ValueError, match=r"'tone' also trained .*(lm_head|tokens)"):
        compose({"style": 1.0, "tone": 0.5}).apply(model)
    model.set_adapter("tone")
    compose({"style": 1.0, "tone": 0.5}).apply(model)


def test_handles_of_all_adapters(model):
    assert [repr(handle) for handle in adapters(model)] == ["style", "tone"]


def test_copies_belong_to_no_model(model, handles):
    mix = handles[0] + 0.5 * handles[1]
    for twin in (copy.deepcopy(mix), pickle.loads(pickle.dumps(mix))):
        assert twin == mix
        twin.apply(several(style={}, tone={}))  # any model with such adapters


def test_the_room_lists_what_it_offers():
    room = importlib.import_module("reftune.composition")  # reftune.compose itself may be the function
    for name in ("compose", "adapters", "strength", "conflicts", "bake", "save_composition", "load_composition"):
        assert callable(getattr(room, name))
