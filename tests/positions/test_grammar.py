"""The language of positions: every term, and an error that says what was found for everything else."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from reftune.positions import Term, groups, parse

TERMS = st.lists(
    st.one_of(
        st.builds(Term, st.sampled_from(["f", "l", "mid", "gen:", "gen/"]), st.integers(1, 10**6)),
        st.builds(Term, st.sampled_from(["prompt", "all", "gen"])),
    ),
    min_size=1,
    unique_by=lambda term: term.name,
)


@pytest.mark.parametrize(
    ("text", "term"),
    [
        ("f2", Term("f", 2)),
        ("l12", Term("l", 12)),
        ("mid1", Term("mid", 1)),
        ("prompt", Term("prompt")),
        ("all", Term("all")),
        ("gen", Term("gen")),
        ("gen:32", Term("gen:", 32)),
        ("gen/64", Term("gen/", 64)),
    ],
)
def test_every_term(text: str, term: Term) -> None:
    assert parse(text) == (term,)
    assert str(term) == text
    assert term.in_prompt == (not text.startswith(("all", "gen")))
    assert term.counts_answer == text.startswith(("gen:", "gen/"))


@settings(max_examples=100, deadline=None, derandomize=True)
@given(terms=TERMS, spaces=st.sampled_from(["+", " + ", "+ "]))
def test_what_is_written_is_read_back_in_order(terms: list[Term], spaces: str) -> None:
    assert parse(spaces.join(map(str, terms))) == tuple(terms)


@settings(max_examples=100, deadline=None, derandomize=True)
@given(st.text(alphabet="flmidgenalprot:/+0123456789- .x", max_size=12))
def test_anything_else_is_a_value_error(text: str) -> None:
    try:
        terms = parse(text)
    except ValueError:
        with pytest.raises(ValueError, match="positions"):
            parse(text)
    else:
        assert parse("+".join(map(str, terms))) == terms


@pytest.mark.parametrize(
    "text",
    [
        "f",
        "2f",
        "f-1",
        "f1.5",
        "F2",
        "first2",
        "gen:",
        "gen/",
        "gen32",
        "mid",
        "l2,f2",
        "f2++l2",
        "+",
        "f2+",
        "f2-l2",
        "all1",
        "prompt2",
    ],
)
def test_an_unknown_term_is_named_with_the_known_ones(text: str) -> None:
    with pytest.raises(
        ValueError, match=r"is no position\. Terms are f2, l2, mid1, prompt, all, gen, gen:32 and gen/64"
    ):
        parse(text)


@pytest.mark.parametrize("text", ["f0", "gen/0", "l2+mid0", "gen:00"])
def test_zero_names_no_token(text: str) -> None:
    with pytest.raises(ValueError, match="names no token: the number must be at least 1"):
        parse(text)


@pytest.mark.parametrize("text", ["f2+f3", "all+all", "gen:2+gen:9"])
def test_a_term_twice_is_an_error(text: str) -> None:
    with pytest.raises(ValueError, match=r"has two terms '.*': join them into one"):
        parse(text)


@pytest.mark.parametrize("value", ["", "  ", None, 3, ["f2"]])
def test_no_expression_at_all(value: object) -> None:
    with pytest.raises(ValueError, match="must be an expression such as 'f2\\+l2', but is"):
        parse(value)  # type: ignore[arg-type]


def test_a_number_beyond_any_sequence_is_an_error() -> None:
    with pytest.raises(ValueError, match="at most"):
        parse("f" + "9" * 30)


def test_one_intervention_a_term_unless_weights_are_shared() -> None:
    assert groups("f2 + l2+gen/64", share_weights=False) == ("f2", "l2", "gen/64")
    assert groups("f2 + l02", share_weights=True) == ("f2+l2",)
