"""A stack: stages of growing rank one after the other, seen through a non-linearity, trained together or apart."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from reftune.interventions import Intervention, StackIntervention, orthonormality_error, retract_all

BETWEEN = {None: lambda x: x, "gelu": torch.nn.functional.gelu, "tanh": torch.tanh, "relu": torch.relu}


def build(ranks: list[int], between: str | None = None, kind: str = "loreft", d: int = 20) -> StackIntervention:
    return StackIntervention(d, ranks, between, kind, init_weights=False)


def train(module: Intervention, steps: int = 20, target: Tensor | None = None, lr: float = 0.3) -> list[float]:
    optimizer = torch.optim.AdamW([p for p in module.parameters() if p.requires_grad], lr=lr, weight_decay=0.1)
    module.train()
    losses = []
    for _ in range(steps):
        retract_all([module])
        h = torch.randn(32, module.embed_dim)
        loss = (module(h) - (1 if target is None else h.abs() @ target)).pow(2).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses


@settings(max_examples=30, deadline=None, derandomize=True)
@given(
    ranks=st.lists(st.integers(1, 8), min_size=1, max_size=4),
    between=st.sampled_from(sorted(BETWEEN, key=str)),
    kind=st.sampled_from(["loreft", "direft", "noreft", "consreft"]),
    seed=st.integers(0, 99),
)
def test_the_formula(ranks: list[int], between: str | None, kind: str, seed: int) -> None:
    torch.manual_seed(seed)
    module = build(ranks, between, kind).double().eval()
    h = torch.randn(5, 20, dtype=torch.float64)
    edit = torch.zeros_like(h)
    for stage in module.stages:
        edit = edit + stage.delta(h + BETWEEN[between](edit))
    torch.testing.assert_close(module(h), h + edit)
    if between is None:  # then it is what the stages do one after the other
        out = h
        for stage in module.stages:
            out = stage(out)
        torch.testing.assert_close(module(h), out)


@pytest.mark.parametrize("between", [None, "gelu", "sigmoid"])
def test_every_stage_starts_at_zero(between: str | None) -> None:
    """Whatever the function between: a new stage adds nothing to those that are trained."""
    h = torch.randn(4, 20)
    module = StackIntervention(20, [1, 2, 4], between)
    assert torch.equal(module(h), h)
    module.train_only(0)
    train(module, 5)
    with torch.no_grad():
        module.eval()
        assert torch.equal(module(h), module.stages[0](h))
        assert not torch.equal(module(h), h)


def test_a_stage_is_trained_alone_bit_for_bit() -> None:
    module = StackIntervention(20, [1, 2, 4], "gelu")
    for number in (0, 1, 2):
        before = [{k: v.clone() for k, v in stage.state_dict().items()} for stage in module.stages]
        module.train_only(number)
        train(module, 5)
        with torch.no_grad():
            module.eval()(torch.randn(2, 20))
        for other, stage in enumerate(module.stages):
            same = all(torch.equal(value, before[other][key]) for key, value in stage.state_dict().items())
            assert same == (other != number)
    module.requires_grad_(True)  # as PEFT's set_adapter does
    assert [stage.R.requires_grad for stage in module.stages] == [False, False, True]
    module.train_only(None)
    assert all(p.requires_grad for p in module.parameters())
    module.train_only([-1, 0])
    assert [stage.W.requires_grad for stage in module.stages] == [True, False, True]


def test_rows_are_orthonormal_after_hard_training() -> None:
    module = StackIntervention(20, [1, 2, 4, 8], "gelu")
    train(module, 30, lr=0.5)
    with torch.no_grad():
        module.eval()(torch.randn(2, 20))
    assert all(orthonormality_error(stage.R) < 1e-5 for stage in module.stages)


def test_the_function_between_makes_it_more_than_affine() -> None:
    """An affine stack has Δ(x) + Δ(y) = Δ(x + y) + Δ(0); with tanh between it has not."""
    for between, affine in ((None, True), ("tanh", False)):
        module = build([2, 4], between).double().eval()
        x, y = torch.randn(2, 6, 20, dtype=torch.float64)
        apart = module.delta(x) + module.delta(y) - module.delta(x + y) - module.delta(torch.zeros_like(x))
        assert (apart.abs().max() < 1e-5) == affine


def test_gradcheck_of_everything_but_r() -> None:
    module = build([1, 2], "gelu", d=6).double()
    h = torch.randn(3, 6, dtype=torch.float64, requires_grad=True)
    for stage in module.stages:
        stage.R.requires_grad_(False)
    free = [p for p in module.parameters() if p.requires_grad]
    assert torch.autograd.gradcheck(lambda *_: module(h), (h, *free))


def test_saved_in_the_middle_of_training_is_what_the_next_step_begins_with() -> None:
    module = build([1, 2], "gelu")
    train(module, 4)
    other = build([1, 2], "gelu")
    other.load_state_dict(module.righted({key: value.clone() for key, value in module.state_dict().items()}))
    for one in (module, other):
        torch.manual_seed(3)
        one.zero_grad()
        one.train()(torch.ones(2, 20)).pow(2).sum().backward()
    for p, q in zip(module.parameters(), other.parameters(), strict=True):
        assert torch.equal(p, q)
        assert torch.equal(p.grad, q.grad)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"ranks": []}, r"a list of ranks, at least 1 each, such as \[1, 2, 4, 8\], but is \[\]"),
        ({"ranks": [0]}, r"but is \[0\]"),
        ({"ranks": 4}, "but is 4"),
        ({"ranks": [1, 9]}, "rank 9 does not fit hidden states of width 8"),
        ({"ranks": [1], "between": "gleu"}, "Unknown act_fn 'gleu'"),
        ({"ranks": [1], "kind": "red"}, "'red' has no rank"),
    ],
)
def test_what_cannot_be_meant(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        StackIntervention(8, **arguments)


def test_an_unknown_stage() -> None:
    with pytest.raises(ValueError, match="no stage 2: this stack has 2, numbered from 0"):
        build([1, 2]).train_only(2)
