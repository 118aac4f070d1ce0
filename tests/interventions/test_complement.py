"""Staying out of others' way: what is written and read, to machine precision, whatever training does."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from reftune.interventions import (
    INTERVENTIONS,
    Intervention,
    LoreftIntervention,
    StackIntervention,
    SubspaceIntervention,
    orthonormal_rows,
    orthonormality_error,
    retract_all,
    taken_by,
)
from reftune.interventions.complement import at_complement, without
from reftune.interventions.orthogonal import rows_at_manifold

KINDS = ["loreft", "noreft", "direft", "nodireft", "consreft", "lobireft", "reft_r1"]
OTHERS = [*KINDS, "postblock"]
LIMIT = {torch.float32: 1e-6, torch.float64: 1e-12}


def build(kind: str, d: int = 32, r: int = 3, **options: object) -> Intervention:
    return INTERVENTIONS[kind](d, r, **{"init_weights": False, **options})


def edit(module: Intervention, h: Tensor) -> Tensor:
    with torch.no_grad():
        return module.eval().edit(h)


def train(module: Intervention, steps: int = 30) -> None:
    optimizer = torch.optim.AdamW(module.parameters(), lr=0.3, weight_decay=0.1)
    dtype = next(module.parameters()).dtype
    module.train()
    for _ in range(steps):
        retract_all([module])
        h = torch.randn(8, module.embed_dim, dtype=dtype)
        optimizer.zero_grad()
        (module(h) - 1).pow(2).mean().backward()
        optimizer.step()


def assert_apart(new: Intervention, others: list[Intervention], dtype: torch.dtype) -> None:
    """Neither reads nor writes what the other writes, and is not read; and so the edits do not change each other."""
    writes, reads = new.directions()
    for other in others:
        their_writes, their_reads = other.directions()
        for mine, theirs in ((writes, their_writes), (writes, their_reads), (reads, their_writes)):
            size = mine.norm(dim=1, keepdim=True) * theirs.norm(dim=1)
            assert ((mine @ theirs.mT).abs() <= LIMIT[dtype] * size.clamp(min=1)).all()
        h = torch.randn(20, new.embed_dim, dtype=dtype)
        for first, second in ((new, other), (other, new)):
            before = edit(second, h)
            after = edit(second, h + edit(first, h))
            scale = max(float(before.abs().max()), float(edit(first, h).abs().max()), 1.0)
            assert (after - before).abs().max() <= 10 * LIMIT[dtype] * scale


# -- the property -----------------------------------------------------------------------------------------------------


@settings(max_examples=25, deadline=None, derandomize=True)
@given(
    kind=st.sampled_from(KINDS),
    others=st.lists(st.sampled_from(OTHERS), min_size=1, max_size=3),
    d=st.integers(28, 60),
    dtype=st.sampled_from([torch.float32, torch.float64]),
    seed=st.integers(0, 999),
)
def test_apart_at_the_start_and_after_training(
    kind: str, others: list[str], d: int, dtype: torch.dtype, seed: int
) -> None:
    torch.manual_seed(seed)
    known = [build(other, d).to(dtype) for other in others]
    new = build(kind, d, 2).to(dtype)
    new.stay_out_of(taken_by(known))
    assert_apart(new, known, dtype)
    train(new, 6)
    assert_apart(new, known, dtype)
    if new.orthonormal:
        assert orthonormality_error(new.rows()) < 1e-5


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("make", ["subspaces", "stack", "stack gelu"])
def test_wholes_stay_out_too_and_can_be_stayed_out_of(make: str, dtype: torch.dtype) -> None:
    def whole() -> Intervention:
        if make == "subspaces":
            return SubspaceIntervention(48, {"a": 2, "b": 1}, init_weights=False).to(dtype)
        between = "gelu" if make.endswith("gelu") else None
        return StackIntervention(48, [1, 2], between, init_weights=False).to(dtype)

    known = [whole(), build("loreft", 48).to(dtype)]
    train(known[0], 5)
    new = whole()
    new.stay_out_of(taken_by(known))
    assert_apart(new, known, dtype)
    train(new, 10)
    assert_apart(new, known, dtype)


@pytest.mark.parametrize("kind", ["loreft", "noreft", "direft", "nodireft", "lobireft"])
def test_an_edit_of_zero_stays_zero_bit_for_bit(kind: str) -> None:
    new = INTERVENTIONS[kind](32, 3)
    new.stay_out_of(taken_by([build("loreft")]))
    h = torch.randn(5, 32)
    assert torch.equal(new(h), h)
    assert torch.equal(new.eval()(h), h)


def test_one_batched_qr_for_all_sites(monkeypatch: pytest.MonkeyPatch) -> None:
    modules = torch.nn.ModuleList([build("loreft") for _ in range(4)])
    for module in modules:
        module.stay_out_of(taken_by([build("loreft")]))
        module.R.data.add_(0.1)
    shapes: list[tuple[int, ...]] = []
    real = torch.linalg.qr
    monkeypatch.setattr(torch.linalg, "qr", lambda m, *a, **k: (shapes.append(tuple(m.shape)), real(m, *a, **k))[1])
    retract_all(modules)
    assert shapes == [(4, 32, 9)]  # 6 taken, 3 rows


def test_what_is_taken_is_counted_once() -> None:
    """An untrained LoReFT has W = R; a second look at the same adapter adds nothing."""
    fresh = LoreftIntervention(32, 3)
    assert taken_by([fresh]).rank == 3
    assert taken_by([fresh, fresh]).rank == 3
    used = build("loreft")
    taken = taken_by([fresh, used, build("lobireft")])
    assert (taken.writes.shape[0], taken.reads.shape[0]) == (9, 3)
    assert orthonormality_error(torch.cat([taken.writes, taken.reads])) < 1e-6


# -- gradients --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_gradcheck_along_the_projection(kind: str) -> None:
    """R and W along their projections, in fp64, against finite differences; R at a point of the complement."""
    module = build(kind, 9, 2).double()
    module.stay_out_of(taken_by([build("loreft", 9, 2).double()]))
    h, weight = torch.randn(4, 9, dtype=torch.float64), torch.randn(4, 9, dtype=torch.float64)
    (module.train()(h) * weight).sum().backward()

    def loss(name: str, value: Tensor) -> Tensor:
        other = copy.deepcopy(module).eval()
        with torch.no_grad():
            other.get_parameter(name).copy_(value)
            return (other(h) * weight).sum()

    step = 1e-6
    for name in [n for n in ("R", "W") if hasattr(module, n)]:
        start = module.get_parameter(name).detach().clone()
        expected = torch.zeros_like(start)
        for i in range(start.shape[0]):
            for j in range(start.shape[1]):
                bump = torch.zeros_like(start)
                bump[i, j] = step
                expected[i, j] = (loss(name, start + bump) - loss(name, start - bump)) / (2 * step)
        torch.testing.assert_close(module.get_parameter(name).grad, expected, atol=1e-7, rtol=1e-5)


def test_gradcheck_of_the_functions() -> None:
    basis = orthonormal_rows(torch.randn(2, 7, dtype=torch.float64))
    rows = orthonormal_rows(torch.randn(3, 7, dtype=torch.float64), basis).requires_grad_()
    assert torch.autograd.gradcheck(lambda a: orthonormal_rows(a, basis), rows)
    weight = torch.randn(3, 7, dtype=torch.float64)
    for value in (rows_at_manifold(rows, basis), orthonormal_rows(rows, basis)):
        rows.grad = None
        (value * weight).sum().backward()
        if value.grad_fn.name().startswith("_RowsAt"):
            closed = rows.grad
    torch.testing.assert_close(closed, rows.grad)
    torch.testing.assert_close(
        torch.autograd.grad((at_complement(rows, basis) * weight).sum(), rows)[0], without(weight, basis)
    )


# -- precision, saving, copies ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["loreft", "noreft", "consreft"])
def test_saved_in_the_middle_of_training_is_what_the_next_step_begins_with(kind: str) -> None:
    module = build(kind)
    module.stay_out_of(taken_by([build("loreft")]))
    train(module, 4)
    saved = module.righted({key: value.clone() for key, value in module.state_dict().items()})
    other = copy.deepcopy(module)
    other.load_state_dict(saved)
    for one in (module, other):
        torch.manual_seed(3)
        one.zero_grad()
        one.train()(torch.randn(5, 32)).pow(2).sum().backward()
    for (name, p), q in zip(module.named_parameters(), other.parameters(), strict=True):
        assert torch.equal(p, q), name
        assert torch.equal(p.grad, q.grad), name


@pytest.mark.parametrize("where", ["bf16", "sharded"])
@pytest.mark.parametrize("kind", ["loreft", "noreft", "direft"])
def test_where_r_cannot_be_rewritten_it_is_found_at_each_use(kind: str, where: str) -> None:
    module = build(kind)
    other = build("loreft")
    module.stay_out_of(taken_by([other]))
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    if where == "bf16":
        module.bfloat16()
    module.sharded = where == "sharded"
    limit = 0.02 if module.R.dtype == torch.bfloat16 else 1e-5  # a basis in bf16 is no better
    h = torch.randn(6, 32)
    assert (edit(module, h) @ other.R.mT).abs().max() < limit * edit(module, h).norm(dim=1).max()
    module.train()(h).sum().backward()
    assert module.R.grad.abs().max() > 0


def test_too_small_a_complement_is_an_error_with_numbers() -> None:
    new = LoreftIntervention(12, 4)
    with pytest.raises(ValueError, match=r"no room for 4 more rows.*write and read 10 of the 12.*leaves 2\. Take r=2"):
        new.stay_out_of(taken_by([build("loreft", 12, 5)]))
    with pytest.raises(ValueError, match="no room for 4 more rows"):
        SubspaceIntervention(12, {"a": 2, "b": 2}).stay_out_of(taken_by([build("loreft", 12, 5)]))
    with pytest.raises(ValueError, match="RedIntervention reads or writes every direction"):
        taken_by([build("red", 12)])
    exact = LoreftIntervention(12, 2)
    exact.stay_out_of(taken_by([build("loreft", 12, 5)]))
    assert orthonormality_error(exact.R) < 1e-6
