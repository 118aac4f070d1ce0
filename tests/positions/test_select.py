"""Terms × layout → tokens, against the slow reference; the paper's rule for short prompts; batches without a prompt."""

import pytest
import slow_positions as slow
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from reftune.positions import NoPromptError, check_prompts, layout, parse, select, select_group

EXPRESSIONS = st.lists(
    st.one_of(
        st.builds("{}{}".format, st.sampled_from(["f", "l", "mid", "gen:", "gen/"]), st.integers(1, 7)),
        st.sampled_from(["prompt", "all", "gen"]),
    ),
    min_size=1,
    max_size=5,
    unique_by=lambda term: term.rstrip("0123456789"),
).map("+".join)


@settings(max_examples=300, deadline=None, derandomize=True)
@given(
    expression=EXPRESSIONS,
    rows=st.integers(0, 4),
    columns=st.integers(0, 14),
    seed=st.integers(0, 10**6),
    data=st.data(),
)
def test_selection_is_the_slow_references(
    expression: str, rows: int, columns: int, seed: int, data: st.DataObject
) -> None:
    generator = torch.Generator().manual_seed(seed)
    real = torch.rand(rows, columns, generator=generator) < data.draw(st.sampled_from([0.5, 1.1]))
    response = torch.rand(rows, columns, generator=generator) < 0.15 if data.draw(st.booleans()) else None
    starts = torch.rand(rows, columns, generator=generator) < 0.2 if data.draw(st.booleans()) else None
    places, terms = layout(real, response, starts), parse(expression)
    together = torch.zeros_like(real)
    for term in terms:
        got = select(term, places, terms)
        assert got.dtype == torch.bool
        together |= got
        for row in range(rows):
            tokens = slow.places(*(None if t is None else t[row].tolist() for t in (real, response, starts)))
            assert got[row].tolist() == slow.chosen(tokens, str(term), expression), str(term)
    assert torch.equal(select_group(terms, places, terms), together)
    assert not (together & ~real).any()


def names(expression: str, prompt: int, answer: int = 0) -> list[list[int]]:
    """Columns that each term names, of one row with so many prompt and answer tokens."""
    real = torch.ones(1, prompt + answer, dtype=torch.bool)
    places, terms = layout(real, (torch.arange(prompt + answer) >= prompt).unsqueeze(0)), parse(expression)
    return [select(term, places, terms)[0].nonzero().flatten().tolist() for term in terms]


@pytest.mark.parametrize(
    ("expression", "n", "expected"),
    [
        ("f2+l2", 5, [[0, 1], [3, 4]]),
        ("f2+l2", 4, [[0, 1], [2, 3]]),
        ("f2+l2", 3, [[0], [1, 2]]),
        ("f2+l2", 2, [[0], [1]]),
        ("f2+l2", 1, [[], [0]]),
        ("f7+l7", 9, [[0, 1, 2, 3], [4, 5, 6, 7, 8]]),
        ("f1+l5", 5, [[0], [2, 3, 4]]),
        ("f5+l1", 5, [[0, 1], [4]]),
        ("f1", 1, [[0]]),
        ("l1", 1, [[0]]),
        ("f3", 3, [[0, 1, 2]]),
    ],
)
def test_short_prompts_follow_the_papers_rule(expression: str, n: int, expected: list[list[int]]) -> None:
    assert names(expression, n, answer=3) == expected


@settings(max_examples=200, deadline=None, derandomize=True)
@given(p=st.integers(1, 20), s=st.integers(1, 20), n=st.integers(1, 50))
def test_prefix_and_suffix_never_overlap_and_fill_a_prompt_shorter_than_both(p: int, s: int, n: int) -> None:
    first, last = names(f"f{p}+l{s}", n)
    assert not set(first) & set(last)
    if n >= p + s:
        assert (len(first), len(last)) == (p, s)
    else:
        assert len(first) == min(p, n // 2)
        assert len(last) == min(s, (n + 1) // 2)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(n=st.integers(1, 30), k=st.integers(1, 40))
def test_mid_is_in_the_middle(n: int, k: int) -> None:
    assert names("mid1", n, answer=2) == [[n // 2]]
    [chosen] = names(f"mid{k}", n, answer=2)
    assert len(chosen) == min(k, n)
    if k <= n:
        assert n // 2 in chosen


def test_generated_tokens() -> None:
    assert names("gen", 2, 4) == [[2, 3, 4, 5]]
    assert names("gen:2", 2, 4) == [[2, 3]]
    assert names("gen:9", 2, 4) == [[2, 3, 4, 5]]
    assert names("gen/2", 2, 5) == [[3, 5]]
    assert names("gen/9", 2, 5) == [[]]
    assert names("prompt", 2, 4) == [[0, 1]]
    assert names("all", 2, 4) == [[0, 1, 2, 3, 4, 5]]
    assert names("gen+f1+l1", 2, 0) == [[], [0], [1]]


def test_rows_of_a_batch_have_budgets_of_their_own() -> None:
    real = torch.tensor([[False, False, True], [True, True, True]])
    terms = parse("f1+l2")
    places = layout(real)
    assert select(terms[0], places, terms).tolist() == [[False, False, False], [True, False, False]]
    assert select(terms[1], places, terms).tolist() == [[False, False, True], [False, True, True]]


def test_the_expression_may_be_any_iterable() -> None:
    terms = parse("f2+l2")
    places = layout(torch.ones(1, 3, dtype=torch.bool))
    assert torch.equal(select(terms[1], places, iter(terms)), select(terms[1], places, terms))


@pytest.mark.parametrize("expression", ["f2", "l2", "mid1", "prompt", "gen", "gen:4", "gen/4", "all+l1"])
def test_a_row_whose_labels_leave_no_prompt_is_an_error_that_says_so(expression: str) -> None:
    labels = torch.tensor([[-100, 4, 5], [3, 4, 5]])
    places = layout(torch.ones(2, 3, dtype=torch.bool), labels != -100)
    with pytest.raises(
        NoPromptError, match=r"labels of row 1 leave no prompt.*Set the labels of the prompt to -100"
    ) as error:
        check_prompts(places, parse(expression))
    assert f"positions='{expression}'" in str(error.value)
    assert isinstance(error.value, ValueError)


def test_a_packed_sequence_without_a_prompt_is_found() -> None:
    starts = torch.tensor([[True, False, True, False]])
    real = torch.ones(1, 4, dtype=torch.bool)
    check_prompts(layout(real, torch.tensor([[False, True, False, True]]), starts), parse("f1"))
    with pytest.raises(NoPromptError, match="row 0"):
        check_prompts(layout(real, torch.tensor([[False, True, True, True]]), starts), parse("f1"))


def test_batches_that_are_fine() -> None:
    whole = torch.ones(2, 3, dtype=torch.bool)
    check_prompts(layout(whole), parse("f2"))  # everything is prompt
    check_prompts(layout(whole, whole), parse("all"))
    padding = torch.tensor([[False] * 3, [True] * 3])
    check_prompts(layout(padding, torch.tensor([[True] * 3, [False, False, True]])), parse("f2"))
    for shape in ((0, 3), (2, 0), (0, 0)):
        empty = torch.ones(shape, dtype=torch.bool)
        check_prompts(layout(empty, empty), parse("f2+l2"))
