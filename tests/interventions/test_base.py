"""The frame of every kind: settings, errors, dropout, bias, copies, and one's own kinds by decorator."""

import copy
import io
import pickle

import pytest
import torch
from torch import Tensor, nn

from reftune.interventions import (
    INTERVENTIONS,
    ConsreftIntervention,
    Intervention,
    LobireftIntervention,
    LoreftIntervention,
    LowRankIntervention,
    NoreftIntervention,
    PostBlockIntervention,
    RedIntervention,
    ReftR1Intervention,
    intervention_class,
    kind_of,
    register_intervention,
)

KINDS = sorted(kind for kind, cls in INTERVENTIONS.items() if cls.__module__.startswith("reftune."))
WITH_RANK = [kind for kind in KINDS if INTERVENTIONS[kind].has_rank]
WITH_BIAS = [kind for kind in KINDS if kind not in ("reft_r1", "postblock")]


@pytest.fixture
def registry():
    """Puts the registry back afterwards."""
    before = dict(INTERVENTIONS)
    yield INTERVENTIONS
    INTERVENTIONS.clear()
    INTERVENTIONS.update(before)


# -- bad input --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rank", [0, -1, 13, 2.5, None, "4"])
@pytest.mark.parametrize("kind", WITH_RANK)
def test_an_impossible_rank_is_an_error_naming_it_and_the_width(kind: str, rank: object) -> None:
    with pytest.raises(ValueError, match=rf"between 1 and the width .*12.*{rank!r}"):
        INTERVENTIONS[kind](12, rank)


@pytest.mark.parametrize("kind", ["red", "reft_r1"])
def test_kinds_without_a_rank_ignore_it(kind: str) -> None:
    for rank in (None, 4, 99):
        assert INTERVENTIONS[kind](3, rank)(torch.randn(2, 3)).shape == (2, 3)


def test_a_rank_equal_to_the_width_is_fine() -> None:
    h = torch.randn(5, 4)
    assert torch.equal(LoreftIntervention(4, 4)(h), h)


@pytest.mark.parametrize("kind", KINDS)
def test_another_width_is_an_error_naming_both(kind: str) -> None:
    with pytest.raises(ValueError, match=r"width 12.*\(2, 13\) is 13"):
        INTERVENTIONS[kind](12, 2)(torch.zeros(2, 13))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"act_fn": "rleu"}, "Unknown act_fn 'rleu'.*relu"),
        ({"act_fn": torch.relu}, "Unknown act_fn"),
        ({"bias": "leraned"}, "bias must be .*'leraned'"),
        ({"bias": True}, "bias must be .*True"),
        ({"dropout": 1.0}, "probability.*1.0"),
        ({"dropout": -0.1}, "probability.*-0.1"),
        ({"dropout": "0.1"}, "probability.*'0.1'"),
        ({"dropout": float("nan")}, "probability.*nan"),
        ({"add_bias": False}, "LoreftIntervention has no setting 'add_bias'"),
        ({"low_rank_dimenson": 2}, "no setting 'low_rank_dimenson'"),
    ],
)
def test_bad_settings_are_named(settings: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LoreftIntervention(12, 2, **settings)


@pytest.mark.parametrize(
    ("cls", "settings", "message"),
    [
        (ConsreftIntervention, {"bias": "none"}, "nothing but b"),
        (LobireftIntervention, {"bias": "none"}, "nothing but b"),
        (LobireftIntervention, {"bias": "frozen"}, "never edits"),
        (ConsreftIntervention, {"act_fn": "relu"}, "constant source"),
        (RedIntervention, {"act_fn": "relu"}, "RED is"),
        (ReftR1Intervention, {"act_fn": "tanh"}, "its own ReLU"),
        (ReftR1Intervention, {"topk": 0}, "topk must be at least 1, but is 0"),
        (ReftR1Intervention, {"top_k": 3}, "no setting 'top_k'.*topk"),
        (PostBlockIntervention, {"act_fn": "relu"}, "SiLU"),
    ],
)
def test_settings_without_a_place_in_the_formula_are_refused(cls: type, settings: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        cls(12, **settings)


def test_an_unknown_kind_is_an_error_with_the_nearest_name() -> None:
    with pytest.raises(ValueError, match=r"Unknown intervention 'LoReTF'.*Did you mean 'loreft'\?.*Known: .*red"):
        intervention_class("LoReTF")
    with pytest.raises(ValueError, match=r"Unknown intervention 'xyzzy'\. Known"):
        intervention_class("xyzzy")


# -- dropout, bias ----------------------------------------------------------------------------------------------------


def test_dropout_is_on_the_edit_alone_and_off_in_eval() -> None:
    module = RedIntervention(2000, dropout=0.25)
    with torch.no_grad():
        module.b.fill_(3.0)
    h = torch.randn(2000)
    edit = module.train()(h) - h
    dropped = edit.abs() < 1e-5
    assert 0.2 < dropped.float().mean() < 0.3
    torch.testing.assert_close(edit[~dropped], torch.full_like(edit[~dropped], 4.0), atol=1e-5, rtol=0)
    torch.testing.assert_close(module.eval()(h), h + 3.0)
    assert torch.equal(module(h), module(h))


def test_dropout_leaves_h_alone_where_the_edit_is_zero() -> None:
    h = torch.randn(50, 12)
    assert torch.equal(LoreftIntervention(12, 2, dropout=0.9).train()(h), h)


@pytest.mark.parametrize("kind", WITH_BIAS)
def test_bias_learned_frozen_and_none(kind: str) -> None:
    cls = INTERVENTIONS[kind]
    learned, frozen = cls(12, 2, init_weights=False), cls(12, 2, bias="frozen", init_weights=False)
    assert isinstance(learned.b, nn.Parameter)
    assert "b" in dict(learned.named_parameters())
    assert "b" in frozen.state_dict()
    assert "b" not in dict(frozen.named_parameters())
    assert sum(p.numel() for p in learned.parameters()) == sum(p.numel() for p in frozen.parameters()) + len(learned.b)
    if kind in ("consreft", "lobireft"):
        return
    none = cls(12, 2, bias="none", init_weights=False)
    assert none.b is None
    assert "b" not in none.state_dict()
    assert none(torch.randn(3, 12)).shape == (3, 12)


def test_a_frozen_bias_is_saved_loaded_and_never_trained() -> None:
    module = NoreftIntervention(12, 2, bias="frozen", init_weights=False)
    before = module.b.clone()
    optimizer = torch.optim.AdamW(module.parameters(), lr=1.0)
    for _ in range(3):
        optimizer.zero_grad()
        module(torch.randn(5, 12)).pow(2).sum().backward()
        optimizer.step()
    assert torch.equal(module.b, before)
    twin = NoreftIntervention(12, 2, bias="frozen", init_weights=False)
    assert not torch.equal(twin.b, before)
    twin.load_state_dict(module.state_dict())
    assert torch.equal(twin.b, before)
    h = torch.randn(5, 12)
    assert torch.equal(twin(h), module(h))


@pytest.mark.parametrize("kind", KINDS)
def test_only_the_documented_names_are_saved(kind: str) -> None:
    names = set(INTERVENTIONS[kind](12, 2).state_dict())
    assert names <= {"R", "W", "b", "s", "W_down", "W_up"}


# -- construction and copies ------------------------------------------------------------------------------------------


def test_dtype_and_device() -> None:
    module = LoreftIntervention(12, 2, dtype=torch.float64, device="cpu")
    assert {p.dtype for p in module.parameters()} == {torch.float64}
    assert all(p.is_meta for p in LoreftIntervention(12, 2, device="meta").parameters())


@pytest.mark.parametrize("kind", KINDS)
def test_config_builds_the_module_again(kind: str) -> None:
    settings = {"topk": 3} if kind == "reft_r1" else {}
    module = INTERVENTIONS[kind](12, 2, dropout=0.1, init_weights=False, **settings)
    config = module.config()
    assert config["intervention"] == kind
    assert config["r"] == {"red": None, "reft_r1": 1}.get(kind, 2)
    twin = intervention_class(config["intervention"])(
        12,
        config["r"],
        act_fn=config["act_fn"],
        dropout=config["dropout"],
        bias=config["bias"],
        init_weights=config["init_weights"],
        **config["intervention_kwargs"],
    )
    assert twin.config() == config
    twin.load_state_dict(module.state_dict())
    h = torch.randn(9, 12)
    assert torch.equal(twin.eval()(h), module.eval()(h))


@pytest.mark.parametrize("how", ["deepcopy", "pickle", "torch.save"])
@pytest.mark.parametrize(("kind", "act_fn"), [*[(k, None) for k in KINDS], ("loreft", "gelu"), ("direft", "silu")])
def test_copies_are_equal_and_independent(kind: str, how: str, act_fn: str | None) -> None:
    module = INTERVENTIONS[kind](12, 2, act_fn=act_fn, init_weights=False).eval()
    h = torch.randn(4, 12)
    with torch.no_grad():
        expected = module(h)  # the rows are settled, and the copy must not share them
    if how == "deepcopy":
        twin = copy.deepcopy(module)
    elif how == "pickle":
        twin = pickle.loads(pickle.dumps(module))
    else:
        file = io.BytesIO()
        torch.save(module, file)
        file.seek(0)
        twin = torch.load(file, weights_only=False)
    with torch.no_grad():
        assert torch.equal(twin(h), expected)
        for parameter in module.parameters():
            parameter.add_(1.0)
        assert torch.equal(twin(h), expected)
        assert not torch.equal(module(h), expected)


def test_what_is_remembered_is_not_copied() -> None:
    module = LoreftIntervention(12, 2).bfloat16().eval()
    size = len(pickle.dumps(module))
    with torch.no_grad():
        module(torch.randn(1, 12))
    assert len(pickle.dumps(module)) == size


def test_repr_tells_width_and_rank() -> None:
    assert repr(LoreftIntervention(12, 2)) == "LoreftIntervention(d=12, r=2)"
    assert repr(RedIntervention(12)) == "RedIntervention(d=12)"


# -- one's own kinds --------------------------------------------------------------------------------------------------


def test_a_kind_of_ones_own_is_a_subclass_and_a_decorator(registry: dict) -> None:
    @register_intervention("shift")
    class ShiftIntervention(Intervention):
        """The one of the module's docstring."""

        def reset_parameters(self) -> None:
            self.b = torch.nn.Parameter(torch.zeros(self.embed_dim))

        def delta(self, h: Tensor, segments: Tensor | None = None) -> Tensor:
            return self.b.expand_as(h)

    assert intervention_class("shift") is ShiftIntervention
    module = ShiftIntervention(12)
    assert module.config()["intervention"] == "shift"
    with torch.no_grad():
        module.b += 2
    assert torch.equal(module(torch.zeros(3, 12)), torch.full((3, 12), 2.0))


def test_a_low_rank_kind_of_ones_own_has_orthonormal_rows_and_settings(registry: dict) -> None:
    @register_intervention("scale_subspace")
    class ScaleSubspace(LowRankIntervention):
        orthonormal = True
        setting_names = ("start",)

        def reset_parameters(self) -> None:
            self._make_rows()
            self.W = nn.Parameter(torch.full((self.low_rank_dimension,), float(self.settings.get("start", 0.0))))

        def delta(self, h: Tensor, segments: Tensor | None = None) -> Tensor:
            rows = self.rows()
            return (self.W * (h @ rows.T)) @ rows

    module = ScaleSubspace(12, 2, start=1.0)
    assert module.config()["intervention_kwargs"] == {"start": 1.0}
    h = torch.randn(3, 12)
    torch.testing.assert_close(module(h) @ module.R.T, 2 * h @ module.R.T)


def test_a_taken_name_is_refused(registry: dict) -> None:
    with pytest.raises(ValueError, match="'loreft' is LoreftIntervention already"):

        @register_intervention("loreft")
        class Mine(LoreftIntervention):
            pass


def test_the_same_class_may_be_registered_again(registry: dict) -> None:
    """A notebook's cell that is run twice."""
    for _ in range(2):

        @register_intervention("again")
        class Again(NoreftIntervention):
            pass

    assert INTERVENTIONS["again"] is Again


def test_an_unregistered_subclass_does_not_pass_for_its_parent(registry: dict) -> None:
    class Mine(LoreftIntervention):
        pass

    assert Mine(12, 2)(torch.zeros(1, 12)).shape == (1, 12)  # as a plain module it is fine
    with pytest.raises(ValueError, match=r"Mine is not a registered intervention.*@register_intervention"):
        Mine(12, 2).config()
    with pytest.raises(ValueError, match="Bare is not a registered"):
        kind_of(type("Bare", (Intervention,), {}))
    assert kind_of(LoreftIntervention) == "loreft"
