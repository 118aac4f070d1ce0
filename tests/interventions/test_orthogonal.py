"""R Rᵀ = I: the projection onto orthonormal rows, and the gradient that goes with it."""

import copy
from collections.abc import Callable

import pytest
import torch
from hard_training import KINDS, build
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from reftune.interventions import orthonormal_rows, orthonormality_error, retract_
from reftune.interventions.orthogonal import right_rows, rows_at_manifold

# -- the projection ---------------------------------------------------------------------------------------------------


@settings(max_examples=80, deadline=None, derandomize=True)
@given(d=st.integers(1, 64), scale=st.sampled_from([1e-6, 1e-3, 1.0, 1e3]), seed=st.integers(0, 999), data=st.data())
def test_orthonormal_rows_is_idempotent_bit_for_bit(d: int, scale: float, seed: int, data: st.DataObject) -> None:
    torch.manual_seed(seed)
    dtype = data.draw(st.sampled_from([torch.float32, torch.float64]))
    rows = orthonormal_rows(torch.randn(data.draw(st.integers(1, d)), d, dtype=dtype) * scale)
    assert rows.dtype == dtype
    assert orthonormality_error(rows) < (2e-6 if dtype == torch.float32 else 1e-13)
    assert torch.equal(orthonormal_rows(rows), rows)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(d=st.integers(1, 40), count=st.integers(1, 9), seed=st.integers(0, 999), data=st.data())
def test_stacked_equals_single(d: int, count: int, seed: int, data: st.DataObject) -> None:
    """To the bit where rows are orthonormal already; LAPACK's last bit may depend on where a matrix lies in memory."""
    torch.manual_seed(seed)
    matrices = torch.randn(count, data.draw(st.integers(1, d)), d)
    matrices[::2] = orthonormal_rows(matrices[::2])  # those on the manifold stay beside those that are not
    stacked = orthonormal_rows(matrices)
    for i, (matrix, rows) in enumerate(zip(matrices, stacked, strict=True)):
        assert i % 2 or torch.equal(matrix, rows)
        bound = 1e-6 * max(1.0, float(torch.linalg.cond(matrix)))  # of a QR's rounding
        torch.testing.assert_close(orthonormal_rows(matrix), rows, rtol=0, atol=bound)
    parameters = [torch.nn.Parameter(m.clone()) for m in matrices]
    retract_(parameters)
    assert torch.equal(torch.stack([p.detach() for p in parameters]), stacked)


def test_the_projection_keeps_the_row_space_and_the_first_direction() -> None:
    matrix = torch.randn(3, 10, dtype=torch.float64)
    rows = orthonormal_rows(matrix)
    torch.testing.assert_close(rows[0], matrix[0] / matrix[0].norm())
    torch.testing.assert_close(matrix @ rows.T @ rows, matrix)
    assert (torch.diagonal(matrix @ rows.T) > 0).all()  # no sign flips: a small step stays a small step


def test_a_small_step_moves_the_rows_a_little() -> None:
    rows = orthonormal_rows(torch.randn(4, 20))
    assert (orthonormal_rows(rows + 1e-3 * torch.randn(4, 20)) - rows).abs().max() < 0.02


def test_rows_of_zero_and_dependent_rows_come_back_orthonormal() -> None:
    for matrix in (torch.zeros(3, 8), torch.ones(3, 8), torch.randn(1, 8).expand(3, 8) * 1e-20):
        assert orthonormality_error(orthonormal_rows(matrix)) < 1e-5


@settings(max_examples=60, deadline=None, derandomize=True)
@given(d=st.integers(2, 40), step=st.sampled_from([1e-6, 1e-3, 0.02, 0.3]), seed=st.integers(0, 999), data=st.data())
def test_retraction_near_the_manifold_is_the_projection(d: int, step: float, seed: int, data: st.DataObject) -> None:
    """Which is a Cholesky factorisation near by and a QR far away; beside other rows too."""
    torch.manual_seed(seed)
    dtype = data.draw(st.sampled_from([torch.float32, torch.float64]))
    k = data.draw(st.integers(0, d // 2))
    r = data.draw(st.integers(1, d - k))
    every = orthonormal_rows(torch.randn(3, k + r, d, dtype=dtype))
    beside = list(every[:, :k]) if k else None
    moved = every[:, k:] + step * torch.randn(3, r, d, dtype=dtype) / d**0.5
    expected = orthonormal_rows(moved, every[:, :k] if k else None)
    parameters = [torch.nn.Parameter(rows.clone()) for rows in moved]
    retract_(parameters, beside)
    found = torch.stack([p.detach() for p in parameters])
    torch.testing.assert_close(found, expected, rtol=0, atol=5e-6 if dtype == torch.float32 else 1e-12)
    assert orthonormality_error(torch.cat([every[:, :k], found], 1)).max() < (4e-6 if dtype == torch.float32 else 1e-12)
    retract_(parameters, beside)
    assert torch.equal(torch.stack([p.detach() for p in parameters]), found)  # once is enough


@settings(max_examples=40, deadline=None, derandomize=True)
@given(d=st.integers(4, 40), count=st.integers(1, 9), beside=st.booleans(), seed=st.integers(0, 999))
def test_what_is_saved_alone_is_what_is_written_in_a_group(d: int, count: int, beside: bool, seed: int) -> None:
    """To the bit near the manifold and on it, whatever else is in the group; a QR's last bit depends on the place."""
    torch.manual_seed(seed)
    r = 1 + seed % (d // 2)
    every = orthonormal_rows(torch.randn(count, min(d, r + 2), d))
    others = [one[r:] for one in every] if beside else None
    step = torch.tensor([0.0, 1e-3, 2.0]).repeat(count)[:count, None, None]
    moved = every[:, :r] + step * torch.randn(count, r, d) / d**0.5
    alone = [right_rows(rows, None if others is None else others[i]) for i, rows in enumerate(moved)]
    parameters = [torch.nn.Parameter(rows.clone()) for rows in moved]
    retract_(parameters, others)
    for i, (parameter, rows) in enumerate(zip(parameters, alone, strict=True)):
        assert i % 3 == 2 or torch.equal(parameter, rows)
        torch.testing.assert_close(parameter.detach(), rows, atol=1e-4, rtol=0)
        assert orthonormality_error(parameter.detach()) < 4e-6


def test_rows_that_hold_no_numbers_are_an_error_of_the_training_not_of_the_projection() -> None:
    rows = torch.nn.Parameter(torch.full((2, 6), float("nan")))
    retract_([rows])
    assert rows.isnan().all()


def test_narrow_types_are_computed_in_fp32_also_under_autocast() -> None:
    matrix = torch.randn(4, 16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rows = orthonormal_rows(matrix)
        assert orthonormality_error(rows) < 2e-6
        assert torch.equal(orthonormal_rows(rows), rows)
    assert orthonormal_rows(matrix.bfloat16()).dtype == torch.float32
    assert orthonormality_error(orthonormal_rows(matrix.bfloat16())) < 2e-6


def test_the_error_is_max_abs_of_gram_minus_identity() -> None:
    matrices = torch.randn(5, 3, 7)
    expected = [(m @ m.T - torch.eye(3)).abs().max() for m in matrices]
    torch.testing.assert_close(orthonormality_error(matrices), torch.stack(expected))


def test_more_rows_than_columns_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"5 rows of width 3"):
        orthonormal_rows(torch.randn(5, 3))


# -- the gradient -----------------------------------------------------------------------------------------------------


@settings(max_examples=40, deadline=None, derandomize=True)
@given(d=st.integers(1, 20), seed=st.integers(0, 999), data=st.data())
def test_the_gradient_of_r_is_that_through_qr(d: int, seed: int, data: st.DataObject) -> None:
    torch.manual_seed(seed)
    r = data.draw(st.integers(1, d))
    start = orthonormal_rows(torch.randn(r, d, dtype=torch.float64))
    weight = torch.randn(r, d, dtype=torch.float64)

    def gradient(function: Callable[[Tensor], Tensor]) -> Tensor:
        rows = start.clone().requires_grad_()
        out = function(rows)
        ((out * weight).sum() + (out**3).sum()).backward()
        return rows.grad

    def through_qr(matrix: Tensor) -> Tensor:
        q, t = torch.linalg.qr(matrix.T)
        return (q * t.diagonal().sign()).T

    torch.testing.assert_close(gradient(rows_at_manifold), gradient(through_qr), atol=1e-9, rtol=1e-9)
    torch.testing.assert_close(gradient(rows_at_manifold), gradient(orthonormal_rows), atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize("kind", KINDS)
def test_gradcheck_of_the_whole_edit_along_the_projection(kind: str) -> None:
    """L(A) = edit with the orthonormal rows of A, at A = R, against finite differences through the projection."""
    module = build(kind, 6, 2).double()
    retract_([module.R])
    h = torch.randn(4, 6, dtype=torch.float64)
    weight = torch.randn(4, 6, dtype=torch.float64)
    start = module.R.detach().clone()

    def loss(matrix: Tensor) -> Tensor:
        other = copy.deepcopy(module).eval()
        with torch.no_grad():
            other.R.copy_(orthonormal_rows(matrix))
            return (other(h) * weight).sum()

    (module(h) * weight).sum().backward()
    step, expected = 1e-6, torch.zeros_like(start)
    for i in range(start.shape[0]):
        for j in range(start.shape[1]):
            bump = torch.zeros_like(start)
            bump[i, j] = step
            expected[i, j] = (loss(start + bump) - loss(start - bump)) / (2 * step)
    torch.testing.assert_close(module.R.grad, expected, atol=1e-7, rtol=1e-5)
    assert torch.autograd.gradcheck(orthonormal_rows, start.clone().requires_grad_())


def test_the_gradient_is_tangent_to_the_scale() -> None:
    """Scaling R or a row of it changes nothing, so the gradient has no part along the row itself."""
    module = build("loreft")
    module(torch.randn(9, 24)).pow(2).sum().backward()
    along = (module.R.grad * module.R.detach()).sum(1)
    torch.testing.assert_close(along, torch.zeros(4), atol=1e-4, rtol=0)


def test_two_forwards_before_one_backward() -> None:
    module = build("loreft")
    h = torch.randn(2, 5, 24)
    (module(h[0]).pow(2).sum() + module(h[1]).pow(2).sum()).backward()
    twin = copy.deepcopy(module)
    twin.zero_grad()
    for part in h:
        twin(part).pow(2).sum().backward()
    torch.testing.assert_close(module.R.grad, twin.R.grad)
