"""Inputs at the edge: nothing, one token, padding alone, positions beyond the sequence."""

import pytest
import torch

from conftest import tiny_llama
from reftune import ReftConfig, get_reft_model
from reftune.positions import layout
from reftune.tuner.batch import Batch, Inputs

POSITIONS = ["f2+l2", "f1+l1", "mid1", "prompt", "all", "gen", "gen:2", "gen/2", "f99+l99", "l99"]


def adapted(positions: str):
    model = get_reft_model(tiny_llama(), ReftConfig(positions=positions, layers="all", init_weights=False))
    return model.eval()


@pytest.mark.parametrize("positions", POSITIONS)
@pytest.mark.parametrize("shape", [(0, 5), (0, 0)])
@torch.no_grad()
def test_an_empty_batch_comes_back_empty(positions: str, shape: tuple[int, int]) -> None:
    """Llama itself cannot reshape one; the edit between two blocks can."""
    model = adapted(positions)
    layer = model.get_base_model().model.layers[1].edit_output
    layer.session.state.batch = Batch(Inputs(shape))
    assert layer(torch.zeros(*shape, 32)).shape == (*shape, 32)


def test_states_of_another_shape_are_refused_though_their_places_are_known() -> None:
    """`generate` knows them before the pass."""
    layer = adapted("all").get_base_model().model.layers[1].edit_output
    for shape in ((2, 4, 32), (2, 32)):
        layer.session.state.batch = Batch(Inputs((2, 5)), places=layout(torch.ones(2, 5, dtype=torch.bool)))
        with pytest.raises(ValueError, match="at this site have the shape"):
            layer(torch.zeros(*shape))


@pytest.mark.parametrize("positions", POSITIONS)
@pytest.mark.parametrize("use_cache", [True, False])
@torch.no_grad()
def test_a_prompt_of_one_token_generates_alike_with_and_without_a_cache(positions: str, use_cache: bool) -> None:
    model, ids = adapted(positions), torch.tensor([[5]])
    settings = {"max_new_tokens": 6, "do_sample": False, "use_cache": use_cache, "pad_token_id": 0}
    found = model.generate(ids, attention_mask=torch.ones_like(ids), **settings)
    expected = adapted(positions).generate(ids, attention_mask=torch.ones_like(ids), **settings | {"use_cache": True})
    assert torch.equal(found, expected)
    edited = not torch.equal(model(ids).logits, tiny_llama()(ids).logits)
    assert edited == (not positions.startswith("gen"))  # of f and l the suffix takes the token: ⌊1/2⌋ = 0, ⌈1/2⌉ = 1


@pytest.mark.parametrize("positions", POSITIONS)
@torch.no_grad()
def test_a_row_of_padding_alone_disturbs_no_other_row(positions: str) -> None:
    model, ids = adapted(positions), torch.tensor([[5, 6, 7, 8], [0, 0, 0, 0]])
    mask = torch.tensor([[1, 1, 1, 1], [0, 0, 0, 0]])
    both = model(ids, attention_mask=mask).logits
    torch.testing.assert_close(both[:1], model(ids[:1]).logits)


@pytest.mark.parametrize("positions", ["f99", "l99", "f99+l99", "mid99"])
@torch.no_grad()
def test_more_positions_than_tokens_edit_every_token_once(positions: str) -> None:
    ids = torch.tensor([[5, 6, 7, 8, 9]])
    model = get_reft_model(tiny_llama(), ReftConfig(positions=positions, share_weights=True, init_weights=False)).eval()
    everywhere = get_reft_model(tiny_llama(), ReftConfig(positions="prompt", share_weights=True)).eval()
    source = {k: v for k, v in model.state_dict().items() if ".reft_" in k}
    target = {k: v for k, v in everywhere.state_dict().items() if ".reft_" in k}
    for (_, value), (_, place) in zip(sorted(source.items()), sorted(target.items()), strict=True):
        place.copy_(value)
    if positions in ("f99", "l99"):  # the rule halves a prompt that is too short even for one of the two
        assert not torch.equal(model(ids).logits, everywhere(ids).logits)
    else:
        torch.testing.assert_close(model(ids).logits, everywhere(ids).logits)
