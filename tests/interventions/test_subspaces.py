"""Subspaces: the sum of the chosen tasks' rows, gradients to those alone, and rows that are orthonormal as a whole."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from reftune.interventions import (
    INTERVENTIONS,
    Choice,
    SubspaceIntervention,
    orthonormality_error,
    retract_all,
    taken_by,
)
from reftune.interventions.together import rows_together

KINDS = ["loreft", "noreft", "direft", "nodireft", "consreft", "lobireft"]
ORTHONORMAL = ["loreft", "direft", "consreft", "lobireft"]


def build(kind: str = "loreft", d: int = 24, **subspaces: int) -> SubspaceIntervention:
    return SubspaceIntervention(d, subspaces or {"a": 2, "b": 3}, kind, init_weights=False)


def whole_rows(module: SubspaceIntervention) -> Tensor:
    return torch.cat([part.R.detach() for part in module.parts.values()])


def train(module: torch.nn.Module, steps: int, choice: Choice | None = None, **options: float) -> None:
    """AdamW at a large learning rate, with weight decay."""
    learned = [p for p in module.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(learned, **{"lr": 0.3, "weight_decay": 0.1, **options})
    module.train()
    target = torch.randn(8, module.embed_dim)
    for _ in range(steps):
        retract_all([module])
        h = torch.randn(8, module.embed_dim)
        optimizer.zero_grad()
        (module(h, choice=choice) - target).pow(2).mean().backward()
        optimizer.step()


# -- the formula ------------------------------------------------------------------------------------------------------


@settings(max_examples=20, deadline=None, derandomize=True)
@given(kind=st.sampled_from(KINDS), ranks=st.lists(st.integers(1, 4), min_size=1, max_size=4), seed=st.integers(0, 99))
def test_all_tasks_together_are_the_undivided_intervention(kind: str, ranks: list[int], seed: int) -> None:
    torch.manual_seed(seed)
    divided = build(kind, 20, **{f"t{i}": rank for i, rank in enumerate(ranks)}).double().eval()
    whole = INTERVENTIONS[kind](20, sum(ranks), init_weights=False).double().eval()
    with torch.no_grad():
        for key, value in whole.state_dict().items():
            value.copy_(torch.cat([part.state_dict()[key] for part in divided.parts.values()]))
    h = torch.randn(5, 20, dtype=torch.float64)
    torch.testing.assert_close(divided(h), whole(h), atol=1e-6, rtol=1e-6)


@settings(max_examples=20, deadline=None, derandomize=True)
@given(kind=st.sampled_from(KINDS), rows=st.integers(1, 6), seed=st.integers(0, 99), data=st.data())
def test_each_row_is_edited_by_its_own_tasks(kind: str, rows: int, seed: int, data: st.DataObject) -> None:
    """h + Rₛᵀ(Wh + b − Rh)ₛ, stated with the rows of s alone."""
    torch.manual_seed(seed)
    module = build(kind, a=2, b=1, c=3).eval()
    entries = data.draw(st.lists(st.sets(st.sampled_from("abc")), min_size=rows, max_size=rows))
    h = torch.randn(rows, 24)
    out = module(h, choice=Choice([sorted(entry) for entry in entries]))
    for row, entry in enumerate(entries):
        expected = h[row] + sum((module.parts[n](h[row], edit_only=True) for n in sorted(entry)), torch.zeros(24))
        torch.testing.assert_close(out[row], expected)
    assert torch.equal(module(h, choice=Choice(["__base__"] * rows)), h)
    torch.testing.assert_close(module(h, choice=Choice([None] * rows)), module(h))


def test_rows_of_several_tokens_and_a_choice_for_all() -> None:
    module = build().eval()
    h = torch.randn(5, 24)
    rows = torch.tensor([0, 0, 1, 1, 1])
    mixed = module(h, rows=rows, choice=Choice(["a", "b"]))
    module.use("a")
    torch.testing.assert_close(mixed[:2], module(h[:2]))
    assert torch.equal(module(h, choice=Choice("b"))[2:], module(h, rows=rows, choice=Choice(["a", "b"]))[2:])
    module.use(None)
    assert torch.equal(module(h, choice=Choice("a+b")), module(h))
    assert torch.equal(module(h, choice=Choice("__base__")), h)


def test_the_start_is_the_identity() -> None:
    h = torch.randn(4, 24)
    for kind in ("loreft", "noreft", "direft", "nodireft", "lobireft"):
        module = SubspaceIntervention(24, {"a": 1, "b": 2}, kind)
        assert torch.equal(module(h), h)
        assert torch.equal(module(h, choice=Choice(["a", "b", "a+b", "__base__"])), h)


# -- gradients --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_reach_the_chosen_rows_only(kind: str) -> None:
    module = build(kind)
    module(torch.randn(4, 24), choice=Choice(["b"] * 4)).pow(2).sum().backward()
    assert all(p.grad is None or not p.grad.any() for p in module.parts["a"].parameters())
    assert all(p.grad.abs().max() > 0 for p in module.parts["b"].parameters())
    module.zero_grad()
    module(torch.randn(4, 24), choice=Choice("b")).pow(2).sum().backward()
    assert all(p.grad is None for p in module.parts["a"].parameters())  # so that no optimiser touches them


@pytest.mark.parametrize("kind", ORTHONORMAL)
def test_gradcheck_along_the_joint_projection(kind: str) -> None:
    """Each task's gradient is that of the loss along `rows_together` with the other task held where it is."""
    module = build(kind, 8, a=2, b=2).double()
    module.put_right_()
    h, weight = torch.randn(5, 8, dtype=torch.float64), torch.randn(5, 8, dtype=torch.float64)
    choice = Choice(["a", "b", "a+b", "a", "b"])
    (module(h, choice=choice) * weight).sum().backward()
    start = whole_rows(module)

    def loss(rows: Tensor, task: int) -> Tensor:
        other = copy.deepcopy(module).eval()
        with torch.no_grad():
            held = torch.arange(4) // 2 != task
            found = rows_together(rows[None], torch.zeros_like(rows)[None], held)[0]
            for part, own in zip(other.parts.values(), found.split(2), strict=True):
                part.R.copy_(own)
            return (other(h, choice=choice) * weight).sum()

    step = 1e-6
    for task, part in enumerate(module.parts.values()):
        expected = torch.zeros(2, 8, dtype=torch.float64)
        for i in range(2):
            for j in range(8):
                bump = torch.zeros_like(start)
                bump[2 * task + i, j] = step
                expected[i, j] = (loss(start + bump, task) - loss(start - bump, task)) / (2 * step)
        torch.testing.assert_close(part.R.grad, expected, atol=1e-7, rtol=1e-5)


def test_gradcheck_of_everything_else() -> None:
    module = build("loreft", 6, a=1, b=2).double()
    h = torch.randn(3, 6, dtype=torch.float64, requires_grad=True)
    free = [p for name, p in module.named_parameters() if not name.endswith(".R")]
    for part in module.parts.values():
        part.R.requires_grad_(False)
    assert torch.autograd.gradcheck(lambda *_: module(h, choice=Choice(["a", "b", None])), (h, *free))


# -- rows -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["all", "b only", "by row", "frozen"])
@pytest.mark.parametrize("kind", ORTHONORMAL)
def test_rows_are_orthonormal_as_a_whole_after_hard_training(kind: str, how: str) -> None:
    module = build(kind)
    if how == "frozen":
        module.train_only("b")
    choice = {"b only": Choice(["b"] * 8), "by row": Choice(["a", "b"] * 4)}.get(how)
    train(module, 25, choice)
    with torch.no_grad():
        module.eval()(torch.randn(2, 24))
    assert torch.isfinite(whole_rows(module)).all()
    assert orthonormality_error(whole_rows(module)) < 1e-5


@pytest.mark.parametrize("order", ["ab", "ba"])
def test_a_frozen_task_stays_bit_for_bit(order: str) -> None:
    """Named first or second, with weight decay and after momentum of its own."""
    module = build(**{name: 2 for name in order})
    train(module, 5)
    with torch.no_grad():
        module.eval()(torch.randn(2, 24))
    before = {name: value.clone() for name, value in module.parts["a"].state_dict().items()}
    trained = module.parts["b"].R.detach().clone()
    h = torch.randn(3, 24)
    edited = module(h, choice=Choice("a"))
    module.train_only("b")
    train(module, 25)
    assert not torch.equal(module.parts["b"].R, trained)
    assert torch.equal(module.eval()(h, choice=Choice("a")), edited)
    assert all(torch.equal(value, before[name]) for name, value in module.parts["a"].state_dict().items())
    assert orthonormality_error(whole_rows(module)) < 1e-5


@pytest.mark.parametrize("decay", [0.0, 0.1])
@pytest.mark.parametrize("choice", [Choice(["b"] * 8), Choice("b")], ids=["by row", "whole"])
def test_a_task_without_rows_in_the_data_stays_bit_for_bit(choice: Choice, decay: float) -> None:
    """Nothing is frozen. Where the whole pass is b's, no optimiser touches a; where rows choose, a's gradient is zero:
    its R stays even under weight decay (which only scales it), W and b without weight decay."""
    module = build()
    h = torch.randn(3, 24)
    with torch.no_grad():
        module.eval()(h)
    before = {name: value.clone() for name, value in module.parts["a"].state_dict().items()}
    train(module, 25, choice, weight_decay=decay)
    with torch.no_grad():
        module.eval()(h)
    after = module.parts["a"].state_dict()
    assert torch.equal(after["R"], before["R"])
    if decay == 0 or choice.for_all:
        assert all(torch.equal(value, before[name]) for name, value in after.items())


def test_the_order_of_the_names_does_not_matter() -> None:
    first = build(a=2, b=3)
    second = build(b=3, a=2)
    second.load_state_dict(first.state_dict())
    for module in (first, second):
        torch.manual_seed(1)
        train(module, 10, Choice(["a", "b"] * 4), lr=0.05)
    for name, part in first.parts.items():
        torch.testing.assert_close(part.R, second.parts[name].R, atol=2e-4, rtol=1e-3)


@settings(max_examples=30, deadline=None, derandomize=True)
@given(d=st.integers(3, 40), seed=st.integers(0, 999), scale=st.sampled_from([1e-3, 1.0, 100.0]), data=st.data())
def test_rows_together(d: int, seed: int, scale: float, data: st.DataObject) -> None:
    """Orthonormal, beside the fixed ones, frozen and unmoved rows bit for bit; alone as in a batch."""
    torch.manual_seed(seed)
    k = data.draw(st.integers(0, d - 2))
    r = data.draw(st.integers(1, d - k))
    dtype = data.draw(st.sampled_from([torch.float32, torch.float64]))
    basis = torch.linalg.qr(torch.randn(3, d, k + r, dtype=dtype))[0].mT.contiguous()
    fixed, last = (basis[:, :k] if k else None), basis[:, k:]
    frozen = torch.rand(r) < 0.3
    still = torch.rand(3, r, 1) < 0.4
    moved = last + scale * torch.randn(3, r, d, dtype=dtype) * (~still & ~frozen.view(1, -1, 1))
    rows = rows_together(torch.where(still & ~frozen.view(1, -1, 1), moved * 0.7, moved), last, frozen, fixed)
    tolerance = 1e-5 if dtype == torch.float32 else 1e-12
    everything = rows if fixed is None else torch.cat([fixed, rows], 1)
    assert (orthonormality_error(everything) < tolerance).all()
    assert torch.equal(rows[:, frozen], last[:, frozen])
    assert torch.equal(rows[still.expand_as(rows)], last[still.expand_as(rows)])
    for one in range(3):
        given = torch.where(still[one] & ~frozen.view(-1, 1), moved[one] * 0.7, moved[one])
        alone = rows_together(given[None], last[one][None], frozen, None if fixed is None else fixed[one][None])
        torch.testing.assert_close(alone[0], rows[one], atol=tolerance, rtol=0)


def test_no_factorisation_where_nothing_has_moved(monkeypatch: pytest.MonkeyPatch) -> None:
    module = build()
    train(module, 3)
    h = torch.randn(2, 24)
    with torch.no_grad():
        first = module.eval()(h)
        monkeypatch.setattr(torch.linalg, "qr", lambda *_, **__: pytest.fail("a QR at inference"))
        assert torch.equal(module(h), first)


def test_saved_in_the_middle_of_training_is_what_the_next_step_begins_with() -> None:
    module = build()
    train(module, 4)
    saved = module.righted({key: value.clone() for key, value in module.state_dict().items()})
    other = build()
    other.load_state_dict(saved)
    for one in (module, other):
        torch.manual_seed(3)
        one.zero_grad()
        one.train()(torch.randn(5, 24)).pow(2).sum().backward()
    for (name, p), q in zip(module.named_parameters(), other.parameters(), strict=True):
        assert torch.equal(p, q), name
        assert torch.equal(p.grad, q.grad), name


@pytest.mark.parametrize("where", ["bf16", "sharded"])
def test_where_r_cannot_be_rewritten_one_qr_finds_all_rows(where: str) -> None:
    module = build()
    train(module, 2)
    if where == "bf16":
        module.bfloat16()
    for part in module.parts.values():
        part.sharded = where == "sharded"
    with torch.no_grad():
        module.eval()(torch.randn(3, 24))
    rows = torch.cat([part.rows() for part in module.parts.values()])
    assert orthonormality_error(rows) < 1e-5
    module.train()(torch.randn(3, 24)).sum().backward()
    assert module.parts["a"].R.grad.abs().max() > 0
    copy.deepcopy(module)


def test_two_forwards_before_one_backward() -> None:
    module = build()
    module.train_only("b")
    h = torch.randn(2, 4, 24)
    (module(h[0]).pow(2).sum() + module(h[1]).pow(2).sum()).backward()
    expected = module.parts["b"].R.grad
    module.zero_grad()
    for part in h:
        module(part).pow(2).sum().backward()
    torch.testing.assert_close(module.parts["b"].R.grad, expected)


# -- staying out of others, settings, errors --------------------------------------------------------------------------


def test_all_tasks_stay_out_of_others() -> None:
    other = INTERVENTIONS["loreft"](24, 3, init_weights=False)
    module = SubspaceIntervention(24, {"a": 2, "b": 2})
    module.stay_out_of(taken_by([other]))
    h = torch.randn(8, 24)
    assert torch.equal(module(h), h)
    train(module, 20, Choice(["a", "b"] * 4))
    with torch.no_grad():
        module.eval()(h)
    rows = whole_rows(module)
    assert orthonormality_error(rows) < 1e-5
    assert (rows @ other.R.T).abs().max() < 1e-6
    assert (rows @ other.W.T).abs().max() < 1e-6


def test_a_copy_is_a_whole_of_its_own() -> None:
    module = build()
    twin = copy.deepcopy(module)
    assert twin.parts["a"].siblings[0] is twin.parts["b"]
    train(twin, 3)
    assert not torch.equal(whole_rows(twin), whole_rows(module))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"subspaces": {}}, 'a dict such as {"a": 2'),
        ({"subspaces": {"a": 0}}, "'a' must have a whole number of rows, at least 1, but has 0"),
        ({"subspaces": {"a.b": 1}}, r"letters, digits, - and _, but one here is 'a\.b'"),
        ({"subspaces": {"all": 1}}, "'all' has a meaning of its own"),
        ({"subspaces": {"a": 5, "b": 4}}, r"between 1 and the width .*\(8\), but is 9"),
        ({"subspaces": {"a": 1}, "kind": "red"}, "'red' has no rows to divide"),
        ({"subspaces": {"a": 1}, "kind": "reft_r1"}, "'reft_r1' has no rows to divide"),
        ({"subspaces": {"a": 1}, "nested": True}, "no setting 'nested'"),
    ],
)
def test_what_cannot_be_meant(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SubspaceIntervention(8, **arguments)


def test_unknown_names() -> None:
    module = build()
    for call in (module.use, module.train_only):
        with pytest.raises(ValueError, match="no subspace 'c'; this intervention has a, b"):
            call(["c"])
    with pytest.raises(ValueError, match=r"no subspace 'c'\. The active adapters have a, b"):
        Choice(["a", "c"]).check(["b", "a"])
    with pytest.raises(ValueError, match="No active adapter has subspaces"):
        Choice("a").check([])
    with pytest.raises(ValueError, match="has 1 entries, but the batch has 2 rows"):
        Choice(["a"]).check(["a"], 2)
    with pytest.raises(ValueError, match="but is 3"):
        Choice(3)
    with pytest.raises(ValueError, match="An entry of subspaces must be a name, a list of names or None, but is 3"):
        Choice([3])


def test_the_config_builds_it_again() -> None:
    module = SubspaceIntervention(24, {"a": 1, "b": 2}, "direft", act_fn="tanh", dropout=0.25, bias="none")
    config = module.config()
    assert (config["intervention"], config["r"], config["subspaces"]) == ("direft", 3, {"a": 1, "b": 2})
    assert (config["act_fn"], config["dropout"], config["bias"]) == ("tanh", 0.25, "none")
