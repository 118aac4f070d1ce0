"""The cache is found under every name that a version of transformers gives it, and no old name is asked for in vain."""

import logging

import pytest
import torch
from transformers import DynamicCache

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
