"""What orthonormal rows cost: one stacked factorisation a training forward, none at inference; what is not written."""

from collections.abc import Callable

import pytest
import torch
from hard_training import KINDS, OPTIMIZERS, build, edit_space, train
from torch import Tensor

import reftune.interventions.orthogonal as orthogonal
from reftune.interventions import LoreftIntervention, NoreftIntervention, orthonormality_error, retract_, retract_all


class Counter:
    """Counts factorisations, torch.linalg.qr of (..., d, r) and cholesky_ex of (..., r, r), by the matrices' shapes."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.shapes: list[tuple[int, ...]] = []
        for name in ("qr", "cholesky_ex"):
            monkeypatch.setattr(torch.linalg, name, self._counted(getattr(torch.linalg, name)))

    def _counted(self, real: Callable) -> Callable:
        def counted(matrix: Tensor, *args: object, **kwargs: object) -> object:
            self.shapes.append(tuple(matrix.shape))
            return real(matrix, *args, **kwargs)

        return counted

    def since(self) -> list[tuple[int, ...]]:
        seen, self.shapes = self.shapes, []
        return seen


@pytest.fixture
def found(monkeypatch: pytest.MonkeyPatch) -> Counter:
    return Counter(monkeypatch)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("kind", KINDS)
def test_no_qr_at_inference_after_the_first_forward(
    kind: str, mode: Callable, dtype: torch.dtype, found: Counter
) -> None:
    module = build(kind)
    train(module, OPTIMIZERS["adamw"](list(module.parameters())), 2)
    module.to(dtype).eval()
    h = torch.randn(3, 24)
    with mode():
        first = module(h)
        assert len(found.since()) > 0
        assert torch.equal(module(h), first)
        assert torch.equal(module(h), first)
    assert found.since() == []


def test_a_loaded_adapter_costs_no_factorisation(found: Counter) -> None:
    source = build("loreft")
    module = build("loreft")
    module.load_state_dict(source.state_dict())
    found.since()
    with torch.no_grad():
        module.eval()(torch.randn(3, 24))
    assert found.since() == []
    assert torch.equal(module.R, source.R)  # nor does it change R by a bit


@pytest.mark.parametrize("moved", ["a little", "far", "nobody may ask"])
def test_one_stacked_factorisation_for_all_sites_in_training(
    moved: str, found: Counter, monkeypatch: pytest.MonkeyPatch
) -> None:
    unasked = moved == "nobody may ask"  # as where a graph is recorded
    if unasked:
        monkeypatch.setattr(orthogonal, "may_ask", lambda device: False)
    modules = torch.nn.ModuleList([build("loreft") for _ in range(6)] + [build("noreft"), build("red")])
    optimizer = torch.optim.AdamW(modules.parameters(), lr=1e-3)
    for step in range(4):
        found.since()
        retract_all(modules)
        h = torch.randn(5, 24)
        for module in modules:
            h = module(h)
        expected = [(6, 4, 4)] if moved == "a little" else [(6, 24, 4)]  # Cholesky near the manifold, else a QR
        assert found.since() == (expected if step or unasked else [])
        optimizer.zero_grad()
        h.pow(2).sum().backward()
        assert found.since() == []  # and nothing is differentiated through
        optimizer.step()
        with torch.no_grad():
            for module in modules[:6]:
                module.R.mul_(3.0 if moved == "far" else 1.0)


def test_two_forwards_before_one_backward_where_r_is_rewritten_each_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first forward's graph must not notice."""
    module = build("loreft")
    h = torch.randn(2, 5, 24)
    (module(h[0]).pow(2).sum() + module(h[1]).pow(2).sum()).backward()
    expected = module.R.grad
    module.zero_grad()
    monkeypatch.setitem(orthogonal._TOLERANCE, torch.float32, -1.0)  # nothing is good enough
    version = module.R._version
    (module(h[0]).pow(2).sum() + module(h[1]).pow(2).sum()).backward()
    torch.testing.assert_close(module.R.grad, expected)
    assert module.R._version >= version + 2


def test_one_factorisation_for_each_shape(found: Counter) -> None:
    modules = [build(d=24), build(d=24), build(d=16), build(d=16, r=2), build(d=16).double()]
    for module in modules:
        module.R.data.mul_(2.0)
    found.since()
    retract_(module.R for module in modules)
    assert sorted(found.since()) == [(1, 16, 2), (1, 16, 4), (1, 16, 4), (2, 24, 4)]
    assert all(orthonormality_error(module.R) < 1e-5 for module in modules)


def test_a_forward_after_retract_all_still_sees_what_was_written_since() -> None:
    module = build("loreft")
    retract_all([module])
    with torch.no_grad():
        module.R.mul_(2.0)
    assert orthonormality_error(edit_space(module)) < 1e-5
    retract_all([module])
    module(torch.randn(2, 24)).sum().backward()
    module.R.data.mul_(2.0)  # no trace, but one forward is what retract_all vouches for
    assert orthonormality_error(edit_space(module)) < 1e-5


def test_retraction_works_under_autocast_too(found: Counter) -> None:
    module = build("loreft")
    found.since()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        retract_([module.R])
        assert found.since() == []  # orthonormal already: bf16 must not blur the check
        module.R.data.mul_(0.9995)
        retract_([module.R])
    assert orthonormality_error(module.R) < 2e-6


def test_retraction_passes_over_what_it_must_not_write() -> None:
    meta = torch.nn.Parameter(torch.empty(2, 8, device="meta"))
    narrow = torch.nn.Parameter(torch.randn(2, 8).bfloat16())
    kept = narrow.detach().clone()
    retract_([meta, narrow])
    assert torch.equal(narrow, kept)
    retract_([])


def test_a_module_made_on_meta_and_materialised_later() -> None:
    module = LoreftIntervention(24, 4, device="meta")
    module.to_empty(device="cpu")
    module.load_state_dict(LoreftIntervention(24, 4).state_dict())
    h = torch.randn(3, 24)
    assert torch.equal(module(h), h)


def test_sharded_rows_are_not_written_and_not_remembered() -> None:
    """FSDP2 gathers R into the same memory every time, and throws away what is written there."""
    module = build("loreft")
    module.sharded = True
    with torch.no_grad():
        module.R.mul_(2.0)
        kept = module.R.clone()
        for _ in range(2):
            module.eval()(torch.randn(3, 24))
            assert orthonormality_error(module.rows()) < 1e-5
    assert orthonormality_error(edit_space(module.train())) < 1e-5
    assert torch.equal(module.R, kept)


def test_unconstrained_rows_are_left_alone() -> None:
    module = NoreftIntervention(24, 4)
    with torch.no_grad():
        module.R.mul_(7.0)
    kept = module.R.detach().clone()
    module(torch.randn(3, 24))
    module.eval()(torch.randn(3, 24))
    assert torch.equal(module.R, kept)
