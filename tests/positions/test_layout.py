"""Where each token stands, against the slow reference and in the cases by name."""

import slow_positions as slow
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from reftune.positions import Layout, generated, layout, packed_starts


@st.composite
def batches(draw: st.DrawFn) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """(real, response, starts) of any shape: nothing is ruled out, holes in the mask neither."""
    rows, columns = draw(st.integers(0, 4)), draw(st.integers(0, 12))

    def flags(likely: float) -> Tensor:
        return torch.rand(rows, columns, generator=generator) < likely

    generator = torch.Generator().manual_seed(draw(st.integers(0, 10**6)))
    real = flags(draw(st.sampled_from([0.5, 0.9, 1.1])))
    response = flags(draw(st.sampled_from([0.05, 0.3]))) if draw(st.booleans()) else None
    starts = flags(draw(st.sampled_from([0.1, 0.4]))) if draw(st.booleans()) else None
    return real, response, starts


def check(places: Layout, real: Tensor, response: Tensor | None, starts: Tensor | None) -> None:
    for row in range(real.shape[0]):
        expected = slow.places(*(None if t is None else t[row].tolist() for t in (real, response, starts)))
        assert places.index[row].tolist() == [t.index for t in expected]
        assert places.generated[row].tolist() == [t.generated for t in expected]
        inside = real[row].tolist()
        assert places.length[row].tolist() == [t.length if r else 0 for t, r in zip(expected, inside, strict=True)]


@settings(max_examples=300, deadline=None, derandomize=True)
@given(batches())
def test_the_layout_is_the_slow_references(batch: tuple[Tensor, Tensor | None, Tensor | None]) -> None:
    real, response, starts = batch
    places = layout(real, response, starts)
    assert places.shape == real.shape
    assert all(t.dtype == torch.long for t in (places.index, places.length, places.generated, places.segment))
    check(places, real, response, starts)


@settings(max_examples=150, deadline=None, derandomize=True)
@given(batches())
def test_segments_are_the_sequences(batch: tuple[Tensor, Tensor | None, Tensor | None]) -> None:
    real, response, starts = batch
    segment = layout(real, response, starts).segment
    seen: dict[int, int] = {}
    for row in range(real.shape[0]):
        for column in range(real.shape[1]):
            number = int(segment[row, column])
            begins = column == 0 or (starts is not None and bool(starts[row, column]))
            if begins:
                assert number not in seen
                seen[number] = row
            else:
                assert number == int(segment[row, column - 1])
    assert sorted(seen) == list(range(len(seen)))


@settings(max_examples=100, deadline=None, derandomize=True)
@given(rows=st.lists(st.tuples(st.integers(1, 6), st.integers(0, 5)), min_size=1, max_size=4), pad=st.integers(0, 3))
def test_left_right_and_no_padding_and_packing_are_one(rows: list[tuple[int, int]], pad: int) -> None:
    """The same sequences (prompt, answer) laid out in four ways: each token stands at the same place."""
    width = max(p + a for p, a in rows) + pad

    def batch(left: bool) -> list[list[tuple[int, int, int]]]:
        real = torch.zeros(len(rows), width, dtype=torch.bool)
        response = torch.zeros_like(real)
        for i, (prompt, answer) in enumerate(rows):
            begin = width - prompt - answer if left else 0
            real[i, begin : begin + prompt + answer] = True
            response[i, begin + prompt : begin + prompt + answer] = True
        return tokens(layout(real, response), real)

    def tokens(places: Layout, real: Tensor) -> list[list[tuple[int, int, int]]]:
        stacked = torch.stack([places.index, places.generated, places.length], -1)
        return [stacked[i][real[i]].tolist() for i in range(len(real))]

    alone = []
    for prompt, answer in rows:
        real = torch.ones(1, prompt + answer, dtype=torch.bool)
        alone += tokens(layout(real, torch.arange(prompt + answer).unsqueeze(0) >= prompt), real)
    assert batch(left=True) == batch(left=False) == alone

    ids = torch.cat([torch.arange(p + a) for p, a in rows]).unsqueeze(0)
    response = torch.cat([torch.arange(p + a) >= p for p, a in rows]).unsqueeze(0)
    real = torch.ones_like(response)
    packed = tokens(layout(real, response, packed_starts(ids, real)), real)
    assert packed == [[token for row in alone for token in row]]


def test_labels_may_start_anywhere_and_the_rest_is_answer() -> None:
    """A turn of a chat that is not labelled (−100) after the first label is no new prompt."""
    labels = torch.tensor([[-100, -100, 5, -100, 7], [5, 6, 7, 8, 9], [-100] * 5])
    places = layout(torch.ones(3, 5, dtype=torch.bool), labels != -100)
    assert places.index.tolist() == [[0, 1, -1, -1, -1], [-1] * 5, [0, 1, 2, 3, 4]]
    assert places.generated.tolist() == [[-1, -1, 0, 1, 2], [0, 1, 2, 3, 4], [-1] * 5]
    assert places.length.tolist() == [[2] * 5, [0] * 5, [5] * 5]


def test_labels_on_padding_do_not_begin_an_answer() -> None:
    real = torch.tensor([[False, False, True, True, True]])
    places = layout(real, torch.tensor([[True, True, False, False, True]]))
    assert places.index.tolist() == [[-1, -1, 0, 1, -1]]
    assert places.generated.tolist() == [[-1, -1, -1, -1, 0]]


def test_a_right_padded_prompt_followed_by_generated_tokens() -> None:
    real = torch.tensor([[True, True, False, True, True], [True, True, True, True, True]])
    places = layout(real, (torch.arange(5) >= 3).expand(2, 5))
    assert places.index.tolist() == [[0, 1, -1, -1, -1], [0, 1, 2, -1, -1]]
    assert places.generated.tolist() == [[-1, -1, -1, 0, 1], [-1, -1, -1, 0, 1]]
    assert places.length.tolist() == [[2, 2, 0, 2, 2], [3, 3, 3, 3, 3]]


def test_a_row_of_padding_alone() -> None:
    real = torch.tensor([[False] * 3, [True] * 3])
    places = layout(real, torch.ones(2, 3, dtype=torch.bool))
    assert places.index[0].tolist() == places.generated[0].tolist() == [-1] * 3
    assert places.length[0].tolist() == [0] * 3
    assert places.generated[1].tolist() == [0, 1, 2]


def test_the_last_columns_are_what_a_decode_step_computes() -> None:
    places = layout(torch.ones(2, 6, dtype=torch.bool), (torch.arange(6) >= 4).expand(2, 6))
    step = places.last(1)
    assert step.shape == (2, 1)
    assert step.index.tolist() == [[-1], [-1]]
    assert step.generated.tolist() == [[1], [1]]
    assert step.length.tolist() == [[4], [4]]
    assert places.last(6).index.tolist() == places.index.tolist()
    assert places.last(0).shape == (2, 0)


def test_generated_tokens_alone_stand_where_the_whole_layout_has_them() -> None:
    places = layout(torch.ones(2, 7, dtype=torch.bool), (torch.arange(7) >= 4).expand(2, 7)).last(2)
    alone = generated(2, torch.tensor([1, 2]))
    assert alone.shape == (2, 2)
    for name in ("index", "generated", "segment"):
        assert torch.equal(getattr(alone, name), getattr(places, name)), name


@settings(max_examples=150, deadline=None, derandomize=True)
@given(st.lists(st.lists(st.integers(1, 5), min_size=1, max_size=4), min_size=1, max_size=3), st.booleans())
def test_packed_starts_are_where_position_ids_restart(rows: list[list[int]], left: bool) -> None:
    """Each row packs sequences of these lengths; rows are padded to one width, with the ids transformers gives pads."""
    width = max(map(sum, rows))
    ids, real = torch.ones(len(rows), width, dtype=torch.long), torch.zeros(len(rows), width, dtype=torch.bool)
    expected = torch.zeros_like(real)
    for i, lengths in enumerate(rows):
        begin = width - sum(lengths) if left else 0
        real[i, begin : begin + sum(lengths)] = True
        for length in lengths:
            ids[i, begin : begin + length] = torch.arange(length)
            expected[i, begin] = True
            begin += length
    starts = packed_starts(ids, real)
    if all(len(lengths) == 1 for lengths in rows):
        assert starts is None
        return
    # where a row begins is one sequence with the padding before it
    inner = real.clone()
    inner[:, 1:] &= real[:, :-1]
    inner[:, 0] = False
    assert torch.equal(starts & inner, expected & inner)
    assert layout(real, None, starts).index[real].tolist() == ids[real].tolist()


def test_positions_that_do_not_restart_are_one_sequence() -> None:
    real = torch.ones(2, 4, dtype=torch.bool)
    assert packed_starts(torch.arange(4).expand(2, 4), real) is None
    assert packed_starts(torch.arange(4).expand(2, 4) + 7, real) is None
    for shape in ((0, 4), (2, 0), (2, 1)):
        assert packed_starts(torch.zeros(shape, dtype=torch.long), torch.ones(shape, dtype=torch.bool)) is None


def test_position_ids_of_left_padding_are_no_restart() -> None:
    """transformers gives pads the position 1, bloom and others 0."""
    real = torch.tensor([[False, False, True, True, True]])
    for pads in ([1, 1], [0, 0], [5, 9]):
        assert packed_starts(torch.tensor([[*pads, 0, 1, 2]]), real) is None
