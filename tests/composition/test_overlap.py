"""What is said about the tokens of groups holds for every prompt length, tried out with the selection itself."""

import itertools

import pytest
import torch

from reftune.positions import groups, layout, parse, select_group
from reftune.positions.overlap import TokenSet

EXPRESSIONS = ["f2+l2", "f2", "l2", "f3+l2", "mid1+l1", "prompt", "all", "gen", "gen:2", "gen/3", "gen/2", "f2+l2+gen"]
EXPRESSIONS += ["prompt+gen", "f2+gen:2"]


def chosen(group, expression):
    """The tokens of a group for prompts of 1 to 9 tokens, each with 7 generated."""
    real = torch.ones(9, 16, dtype=torch.bool)
    columns = torch.arange(16)
    lengths = torch.arange(1, 10).unsqueeze(1)
    places = layout(real & (columns < lengths + 7), (columns >= lengths).expand(9, 16))
    return select_group(parse(group), places, parse(expression))


ALL = [(group, e) for e in EXPRESSIONS for shared in (True, False) for group in groups(e, shared)]


def test_equal_and_disjoint_sets_are_so_for_every_prompt():
    equal = disjoint = 0
    for (g, e), (h, f) in itertools.product(sorted(set(ALL)), repeat=2):
        a, b = TokenSet.of(g, e), TokenSet.of(h, f)
        if a == b:
            equal += 1
            assert torch.equal(chosen(g, e), chosen(h, f)), (g, e, h, f)
        if a.disjoint(b):
            disjoint += 1
            assert not bool((chosen(g, e) & chosen(h, f)).any()), (g, e, h, f)
    assert equal > len(set(ALL))
    assert disjoint > 50


@pytest.mark.parametrize(
    ("a", "b", "apart"),
    [
        (("f2", "f2+l2"), ("l2", "f2+l2"), True),
        (("f2", "f2"), ("l2", "l2"), False),  # a prompt of one token
        (("f2", "f2+l2"), ("gen", "gen"), True),
        (("prompt", "prompt"), ("l1", "l1"), False),
        (("gen:2", "gen:2"), ("gen/3", "gen/3"), True),
        (("gen:3", "gen:3"), ("gen/3", "gen/3"), False),
    ],
)
def test_what_is_apart(a, b, apart):
    assert TokenSet.of(*a).disjoint(TokenSet.of(*b)) is apart


def test_a_short_prompt_shares_out_only_where_both_ends_are_edited():
    assert TokenSet.of("f2", "f2+l2") != TokenSet.of("f2", "f2")
    assert TokenSet.of("f2", "f2+l2") == TokenSet.of("f2", "l2+f2+gen")
    assert TokenSet.of("gen", "f2+gen") == TokenSet.of("gen", "gen")
    assert TokenSet.of("prompt+gen", "prompt+gen").everywhere
    assert not TokenSet.of("prompt", "prompt").everywhere
    assert str(TokenSet.of("l2+f2", "l2+f2")) == "f2+l2"
    assert str(TokenSet.of("l2", "f3+l2")) == "l2 beside f3"
    assert str(TokenSet.of("l2", "l2")) == "l2"
