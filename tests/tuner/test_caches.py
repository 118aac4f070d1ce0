"""The cache is found under every name that a version of transformers gives it, and no old name is asked for in vain."""

import gc
import logging
import weakref

import pytest
import torch
from transformers import DynamicCache, StaticCache

from conftest import tiny_llama
from reference import greedy
from reftune import ReftConfig, get_reft_model
from reftune.tuner.caches import NAMES, cache_among, cache_name, cache_of


@pytest.mark.parametrize("name", NAMES)
def test_every_name_is_known(name):
    cache = DynamicCache()  # an empty one is false
    assert cache_among({name: cache}.get) is cache
    assert cache_among({name: None}.get) is None


def test_of_the_installed_version():
    model = tiny_llama()
    assert cache_name(model) in NAMES
    assert cache_name(torch.nn.Linear(2, 2)) is None
    ids = torch.tensor([[5, 6, 7]])
    assert cache_of(model(ids, use_cache=True)).get_seq_length() == 3
    assert cache_of(model(ids, use_cache=False)) is None
    assert cache_of(model(ids, use_cache=True, return_dict=False)) is None


@pytest.mark.filterwarnings("ignore:.*past_key_values.*deprecated.*")
def test_a_call_with_the_old_name_goes_on_from_its_prompt():
    model = get_reft_model(tiny_llama(dtype=torch.float64), ReftConfig(positions="l1+gen:2", init_weights=False)).eval()
    ids, cache, found = torch.tensor([[5, 9, 3, 77]]), DynamicCache(config=model.config), []
    with torch.no_grad():
        for _ in range(4):
            ids = model(ids, past_key_values=cache, use_cache=True).logits[:, -1:].argmax(-1)
            found.append(int(ids))
    assert found == greedy(model, [5, 9, 3, 77], 4)[0]


def test_users_are_not_warned_of_names_they_did_not_use(caplog):
    logging.getLogger("transformers").propagate = True
    model = get_reft_model(tiny_llama(), ReftConfig(positions="l1")).eval()
    with caplog.at_level(logging.WARNING):
        model(torch.tensor([[5, 6, 7]]), use_cache=True)
        model.generate(torch.tensor([[5, 6, 7]]), attention_mask=torch.ones(1, 3), max_new_tokens=2, do_sample=False)
    assert not [r.message for r in caplog.records if "deprecated" in r.message]


def adapted(positions):
    config = ReftConfig(positions=positions, layers="all", init_weights=False)
    return get_reft_model(tiny_llama(dtype=torch.float64), config).eval()


def held(model, cache):
    return {cache_name(model.get_base_model()): cache}


@pytest.mark.parametrize("positions", ["f2+l2", "l1+gen:2", "prompt", "all"])
@pytest.mark.parametrize("how", ["reset", "crop"])
@torch.no_grad()
def test_an_emptied_cache_begins_a_new_prompt(positions, how):
    model, first, then = adapted(positions), torch.tensor([[5, 6, 7, 8, 9, 10]]), torch.tensor([[20, 21, 22]])
    settings = {"config": model.config} | ({"max_cache_len": 32} if how == "reset" else {})
    cache = (StaticCache if how == "reset" else DynamicCache)(**settings)
    model(first, **held(model, cache))
    cache.reset() if how == "reset" else cache.crop(-6)
    torch.testing.assert_close(model(then, **held(model, cache)).logits, model(then).logits)


@torch.no_grad()
def test_a_cache_cropped_into_its_prompt_goes_on_with_another():
    model, cache = adapted("f2"), DynamicCache()  # edits of the cropped end would have stayed in it, as for l2
    model(torch.tensor([[5, 6, 7, 8, 9, 10]]), **held(model, cache))
    cache.crop(-5)
    after = model(torch.tensor([[30, 31]]), **held(model, cache)).logits
    torch.testing.assert_close(after, model(torch.tensor([[5, 30, 31]])).logits[:, 1:])


@torch.no_grad()
def test_decoding_goes_on_from_a_prompt_that_a_mask_told():
    model, ids = adapted("l2"), torch.tensor([[5, 9, 3, 77]])
    cache, found, step = DynamicCache(), [], {"prompt_mask": torch.ones_like(ids)}
    for _ in range(4):
        ids = model(ids, **held(model, cache), **step).logits[:, -1:].argmax(-1)
        found.append(int(ids))
        step = {}
    assert found == greedy(model, [5, 9, 3, 77], 4)[0]


@torch.no_grad()
def test_a_cache_is_freed_with_its_last_user():
    model, ids = adapted("l1+gen"), torch.tensor([[5, 6, 7]])
    gc.collect()
    gc.disable()
    try:
        cache = DynamicCache()
        by_hand = weakref.ref(cache)
        model(ids, **held(model, cache))
        model(ids[:, :1], **held(model, cache))
        cache = DynamicCache()
        model.generate(ids, **held(model, cache), max_new_tokens=3, do_sample=False)
        generated = weakref.ref(cache)
        del cache
        assert by_hand() is None
        assert generated() is None
    finally:
        gc.enable()
