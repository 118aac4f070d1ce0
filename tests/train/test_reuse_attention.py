"""Packed attention ≡ transformers' sdpa attention."""

import pytest
import torch
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from conftest import tiny_llama
from reftune.train.reuse import attention
from reftune.train.reuse.attention import NAME, attention_configs, packed, packed_attention


@pytest.mark.parametrize("groups", [1, 2, 3])
@pytest.mark.parametrize("additive", [False, True])
def test_values_and_gradients_are_sdpa_s(groups: int, additive: bool) -> None:
    module = torch.nn.Module()
    module.num_key_value_groups, module.is_causal = groups, True
    shapes = [(2, 2 * groups, 5, 8), (2, 2, 11, 8), (2, 2, 11, 8)]
    mask = torch.rand(2, 1, 5, 11) < 0.7
    mask[..., 0] = True
    mask = torch.where(mask, 0.0, -torch.inf).double() if additive else mask
    found = []
    for attend in (packed_attention, sdpa_attention_forward):
        torch.manual_seed(0)
        states = [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes]
        output, weights = attend(module, *states, mask, scaling=0.3, dropout=0.0)
        assert weights is None
        output.sin().sum().backward()
        found.append([output, *(state.grad for state in states)])
    torch.testing.assert_close(*found)


def test_what_it_does_not_know_goes_to_transformers(monkeypatch: pytest.MonkeyPatch) -> None:
    module = torch.nn.Module()
    module.num_key_value_groups, module.is_causal = 2, False
    query, key = torch.randn(1, 4, 3, 8), torch.randn(1, 2, 6, 8)
    mask, calls = torch.ones(1, 1, 3, 6, dtype=torch.bool), []
    monkeypatch.setattr(attention, "sdpa_attention_forward", lambda *a, **k: calls.append(k))
    packed_attention(module, query, key, key, mask, sliding_window=None, softcap=None)
    assert not calls
    packed_attention(module, query, key, key, mask, softcap=3.0)
    packed_attention(module, query, key, key, None)
    packed_attention(module, query, key, key, mask.expand(1, 4, 3, 6))
    assert len(calls) == 3


def test_the_configs_are_as_they_were_also_after_an_error() -> None:
    base = tiny_llama()
    [config] = attention_configs(base)
    with packed([config]):
        assert config._attn_implementation == NAME
    with pytest.raises(KeyError), packed([config]):
        raise KeyError
    assert config._attn_implementation == "sdpa"
    base.set_attn_implementation("eager")
    assert attention_configs(base) == []
