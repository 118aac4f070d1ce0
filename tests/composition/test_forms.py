"""The algebra of edits: each kind's form, sums, sequences, the nearest of a rank; against the interventions."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from reftune.interventions import INTERVENTIONS, Intervention, intervention_class, register_intervention
from reftune.interventions.forms import Form, NoFormError, form_of

D = 12
KINDS = ["loreft", "noreft", "consreft", "lobireft", "direft", "nodireft", "red"]


def make(kind, rank=3, seed=0, **kwargs):
    torch.manual_seed(seed)
    module = intervention_class(kind)(embed_dim=D, low_rank_dimension=rank, init_weights=False, **kwargs).eval()
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if name != "R":
                parameter.add_(torch.randn_like(parameter))
    return module.requires_grad_(False)


def points(seed=1):
    return torch.randn(5, D, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)) * 3


def close(found, wanted, tolerance=1e-6):
    torch.testing.assert_close(found, wanted, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize(
    ("kind", "bias"),
    [(k, "learned") for k in KINDS] + [(k, "none") for k in (*KINDS, "postblock") if k not in ("consreft", "lobireft")],
)
def test_the_form_of_a_kind_computes_its_edit(kind, bias):
    module = make(kind, bias=bias)
    close(form_of(module)(points()), module.delta(points()))


@pytest.mark.parametrize("kind", ["direft", "nodireft"])
@pytest.mark.parametrize("act_fn", ["relu", "gelu", "tanh"])
def test_a_function_on_the_source_is_kept(kind, act_fn):
    module = make(kind, act_fn=act_fn)
    assert form_of(module).act_fn == act_fn
    close(form_of(module)(points()), module.delta(points()))


def test_kinds_without_a_form_say_why():
    with pytest.raises(NoFormError, match="reads h twice"):
        form_of(make("loreft", act_fn="gelu"))
    with pytest.raises(NoFormError, match="couples the tokens"):
        form_of(make("reft_r1"))


@settings(max_examples=25, deadline=None)
@given(st.sampled_from(KINDS), st.sampled_from(KINDS), st.floats(-2, 2), st.floats(-2, 2), st.integers(0, 99))
def test_sums_and_sequences_are_those_of_the_edits(first, second, s, t, seed):
    a, b, h = make(first, 2, seed), make(second, 3, seed + 1), points(seed)
    together = form_of(a).scaled(s).plus(form_of(b).scaled(t))
    close(together(h), s * a.delta(h) + t * b.delta(h))
    after = h + s * a.delta(h)
    sequence = form_of(a).scaled(s).then(form_of(b).scaled(t))
    close(h + sequence(h), after + t * b.delta(after), 1e-5)
    if "red" not in (first, second):
        assert together.rank == sequence.rank == 5


def test_functions_add_up_with_themselves_only():
    a, b, c = make("nodireft", act_fn="gelu"), make("postblock"), make("direft", act_fn="gelu", seed=3)
    close(form_of(a).plus(form_of(c))(points()), a.delta(points()) + c.delta(points()))
    with pytest.raises(NoFormError, match="gelu and the other silu"):
        form_of(a).plus(form_of(b))
    with pytest.raises(NoFormError, match="act_fn"):
        form_of(a).then(form_of(c))


@pytest.mark.parametrize("kind", ["loreft", "consreft", "nodireft"])
def test_the_nearest_of_a_rank_is_the_best_there_is(kind):
    form = form_of(make(kind, 4)).plus(form_of(make("loreft", 3, seed=5)))
    whole = torch.cat([form.up.mT @ form.down, form.constant.unsqueeze(1)], dim=1)
    sizes = torch.linalg.svdvals(whole)
    for rank in (1, 3, 6):
        near, error = form.nearest(rank)
        assert near.rank == rank
        difference = whole - torch.cat([near.up.mT @ near.down, near.constant.unsqueeze(1)], dim=1)
        assert float(difference.norm()) == pytest.approx(float(sizes[rank:].norm()), rel=1e-9)
        assert error == pytest.approx(float(sizes[rank:].norm() / sizes.norm()), rel=1e-9)
        assert error > 0.01
    assert form.nearest(7) == (form, 0.0)
    with pytest.raises(NoFormError, match="affine"):
        form_of(make("red")).nearest(2)


def test_more_rows_than_dimensions_fit_into_the_dimensions():
    form = form_of(make("nodireft", 8))
    for seed in (1, 2):
        form = form.plus(form_of(make("nodireft", 8, seed)))
    near, error = form.nearest(D)
    assert (form.rank, near.rank) == (24, D)
    assert error < 1e-12
    close(near(points()), form(points()), 1e-10)


@pytest.fixture
def own_kinds():
    @register_intervention("test_shift")
    class Shift(Intervention):
        has_rank = False

        def reset_parameters(self):
            self.b = torch.nn.Parameter(torch.zeros(self.embed_dim))

        def delta(self, h, segments=None):
            return self.b.to(h.dtype).expand_as(h)

    @register_intervention("test_project")
    class Project(Intervention):
        def reset_parameters(self):
            self.A = torch.nn.Parameter(torch.randn(self.low_rank_dimension, self.embed_dim))

        def delta(self, h, segments=None):
            rows = self.A.to(h.dtype)
            return h @ rows.mT @ rows + 0.5 * rows[0]

    @register_intervention("test_square")
    class Square(Intervention):
        has_rank = False

        def reset_parameters(self):
            self.b = torch.nn.Parameter(torch.zeros(self.embed_dim))

        def delta(self, h, segments=None):
            return h * h

    yield
    for name in ("test_shift", "test_project", "test_square"):
        del INTERVENTIONS[name]


def test_a_kind_of_ones_own_is_tried_out(own_kinds):
    shift, project = make("test_shift"), make("test_project")
    assert form_of(shift).is_constant
    close(form_of(shift)(points()), shift.delta(points()))
    assert form_of(project).rank == 3  # the constant lies in the rows and costs none of its own
    close(form_of(project)(points()), project.delta(points()))
    with pytest.raises(NoFormError, match="not affine"):
        form_of(make("test_square"))


def test_a_scaling_of_its_own_is_a_diagonal():
    class Scaled(intervention_class("red")):  # a subclass is not its parent: it is tried out
        def delta(self, h, segments=None):
            return 2 * super().delta(h)

    torch.manual_seed(0)
    module = Scaled(embed_dim=D)
    with torch.no_grad():
        module.s.normal_()
        module.b.normal_()
    form = form_of(module)
    assert form.diagonal is not None
    close(form(points()), module.delta(points()).detach())


def test_constant_forms_know_it():
    assert form_of(make("lobireft")).is_constant
    assert not form_of(make("consreft")).is_constant
    assert not form_of(make("red")).is_constant
    assert not Form(torch.ones(1, D), torch.zeros(1, D), torch.ones(1), act_fn="relu").is_constant
