"""Every kind against its formula written out again in numpy: values, step 0, parameter counts, untouched directions."""

import warnings

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from reftune.interventions import INTERVENTIONS, Intervention, LowRankIntervention

KINDS = ["loreft", "noreft", "consreft", "lobireft", "direft", "nodireft", "red", "reft_r1", "postblock"]
STARTS_AT_ZERO = ["loreft", "noreft", "direft", "nodireft", "lobireft", "red", "postblock"]
ORTHONORMAL = ["loreft", "consreft", "lobireft", "direft", "reft_r1"]


def build(kind: str, d: int = 12, r: int = 3, seed: int = 0, **settings: object) -> Intervention:
    torch.manual_seed(seed)
    return INTERVENTIONS[kind](d, r, **settings)


def randomised(kind: str, d: int = 12, r: int = 3, seed: int = 0, **settings: object) -> Intervention:
    """Every parameter random (R orthonormal where the kind says so), in fp64 so that formulas compare to 1e-12."""
    module = build(kind, d, r, seed, **settings).double()
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if name != "R":
                parameter.copy_(torch.randn_like(parameter))
            elif not module.orthonormal:
                parameter.mul_(2.5)
    return module.eval()


ACTIVATIONS = {
    None: lambda x: x,
    "relu": lambda x: np.maximum(x, 0),
    "silu": lambda x: x / (1 + np.exp(-x)),
    "tanh": np.tanh,
    "sigmoid": lambda x: 1 / (1 + np.exp(-x)),
    "softplus": lambda x: np.log1p(np.exp(x)),
}


def restated(kind: str, module: Intervention, h: np.ndarray) -> np.ndarray:
    """The papers' formulas, one token at a time, in column-vector notation."""
    p = {name: value.detach().numpy().copy() for name, value in module.named_parameters()}
    p |= {name: value.numpy().copy() for name, value in module.named_buffers()}
    f = ACTIVATIONS[module.act_fn]
    if "R" in p and kind in ORTHONORMAL:
        p["R"] = np.linalg.svd(p["R"], full_matrices=False)
        p["R"] = p["R"][0] @ p["R"][2]  # the nearest orthonormal rows: removes the rounding of fp32
    b = p.get("b", 0.0)
    out = np.empty_like(h)
    for i, x in enumerate(h):
        if kind in ("loreft", "noreft"):
            out[i] = x + p["R"].T @ (f(p["W"] @ x + b) - p["R"] @ x)
        elif kind in ("direft", "nodireft"):
            out[i] = x + p["R"].T @ f(p["W"] @ x + b)
        elif kind == "consreft":
            out[i] = x + p["R"].T @ (b - p["R"] @ x)
        elif kind == "lobireft":
            out[i] = x + p["R"].T @ b
        elif kind == "red":
            out[i] = p["s"] * x + b
        elif kind == "postblock":
            z = p["W_down"] @ x
            out[i] = x + p["W_up"].T @ (z / (1 + np.exp(-z)))
    if kind == "reft_r1":
        latent = np.sort(np.maximum(h @ p["R"][0], 0))[::-1]
        out = h + latent[: module.topk].mean() * p["R"][0]
    return out


@pytest.mark.parametrize(
    ("kind", "bias"),
    # a constant source is its bias
    [(k, b) for k in KINDS for b in ("learned", "frozen", "none") if b != "none" or k not in ("consreft", "lobireft")],
)
def test_the_formula_is_the_papers(kind: str, bias: str) -> None:
    module = randomised(kind, bias=bias, init_weights=False)
    h = torch.randn(5, 12, dtype=torch.float64)
    np.testing.assert_allclose(module(h).detach().numpy(), restated(kind, module, h.numpy()), atol=2e-6)


@pytest.mark.parametrize("act_fn", [a for a in ACTIVATIONS if a])
@pytest.mark.parametrize("kind", ["loreft", "noreft", "direft", "nodireft"])
def test_act_fn_is_on_the_learned_source(kind: str, act_fn: str) -> None:
    module = randomised(kind, act_fn=act_fn, init_weights=False)
    h = torch.randn(5, 12, dtype=torch.float64)
    np.testing.assert_allclose(module(h).detach().numpy(), restated(kind, module, h.numpy()), atol=2e-6)


def test_linear_is_no_activation() -> None:
    assert build("loreft", act_fn="linear").act_fn is None


@settings(max_examples=60, deadline=None, derandomize=True)
@given(kind=st.sampled_from(KINDS), d=st.integers(1, 24), seed=st.integers(0, 99), data=st.data())
def test_the_formula_holds_at_random(kind: str, d: int, seed: int, data: st.DataObject) -> None:
    module = randomised(kind, d, data.draw(st.integers(1, d)), seed, init_weights=False)
    h = torch.randn(data.draw(st.integers(0 if kind != "reft_r1" else 1, 6)), d, dtype=torch.float64) * 3
    np.testing.assert_allclose(module(h).detach().numpy(), restated(kind, module, h.numpy()), atol=2e-5)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(kind=st.sampled_from(STARTS_AT_ZERO), d=st.integers(1, 40), seed=st.integers(0, 99), data=st.data())
def test_the_edit_is_zero_at_step_0_bit_for_bit(kind: str, d: int, seed: int, data: st.DataObject) -> None:
    module = build(kind, d, data.draw(st.integers(1, d)), seed)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        h = (torch.randn(7, d) * data.draw(st.sampled_from([1e-3, 1.0, 300.0]))).to(dtype)
        for training in (True, False):
            edited = module.train(training)(h)
            assert edited.dtype == dtype
            assert torch.equal(edited, h)


@pytest.mark.parametrize("act_fn", ["gelu", "silu", "tanh", "leaky_relu", "elu", "selu", "mish"])
def test_step_0_is_zero_with_an_act_fn_that_allows_it_and_everything_learns(act_fn: str) -> None:
    module = build("direft", act_fn=act_fn)
    h = torch.randn(7, 12)
    edited = module(h)
    assert torch.equal(edited, h)
    (edited * torch.randn_like(edited)).sum().backward()
    assert module.W.grad.abs().max() > 0
    assert module.b.grad.abs().max() > 0


@pytest.mark.parametrize("act_fn", ACTIVATIONS)
def test_nodireft_starts_at_zero_with_any_act_fn_and_learns_first_what_it_writes(act_fn: str | None) -> None:
    module = build("nodireft", act_fn=act_fn)
    h, weights = torch.randn(7, 12), torch.randn(7, 12)
    assert torch.equal(module(h), h)
    (module(h) * weights).sum().backward()
    assert module.R.grad.abs().max() > 0
    assert torch.linalg.matrix_rank(module.R.grad) == 3  # every row of R sees another read of h
    torch.optim.SGD(module.parameters(), lr=0.1).step()
    module.zero_grad()
    (module(h) * weights).sum().backward()
    assert module.W.grad.abs().max() > 0
    assert module.b.grad.abs().max() > 0


@pytest.mark.parametrize(
    ("kind", "act_fn"), [("loreft", "relu"), ("noreft", "gelu"), *[("direft", a) for a in ("sigmoid", "softplus")]]
)
def test_where_no_start_is_the_identity_a_warning_says_so(kind: str, act_fn: str) -> None:
    with pytest.warns(UserWarning, match=r"not zero at step 0.*init_weights=False") as caught:
        module = INTERVENTIONS[kind](12, 3, act_fn=act_fn)
    assert caught[0].filename == __file__
    assert not torch.equal(module(torch.ones(1, 12)), torch.ones(1, 12))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        build(kind, act_fn=act_fn, init_weights=False)


def test_relu_does_not_start_dead() -> None:
    """relu has no gradient at Wh + b = 0: zeros there would never learn."""
    with pytest.warns(UserWarning, match="relu"):
        module = build("direft", act_fn="relu")
    (module(torch.randn(50, 12)) * torch.randn(50, 12)).sum().backward()
    assert module.W.grad.abs().max() > 0
    assert module.R.grad.abs().max() > 0


@pytest.mark.parametrize("kind", ["consreft", "reft_r1"])
def test_the_documented_exceptions_are_not_zero_at_step_0(kind: str) -> None:
    h = torch.randn(5, 12)
    assert not torch.equal(build(kind)(h), h)


@pytest.mark.parametrize("kind", [k for k in STARTS_AT_ZERO if k != "red"])
def test_init_weights_false_starts_as_pyreft_does(kind: str) -> None:
    module = build(kind, 400, 40, init_weights=False)
    h = torch.randn(5, 400)
    assert not torch.equal(module(h), h)
    if kind == "lobireft":  # torch.rand
        assert 0 <= module.b.min() < 0.2
        assert 0.8 < module.b.max() <= 1
    elif kind != "postblock":  # nn.Linear's bounds
        assert module.W.abs().max() <= 1 / 20
        assert module.W.abs().max() > 0.9 / 20
        assert 0 < module.b.abs().max() <= 1 / 20


@settings(max_examples=30, deadline=None, derandomize=True)
@given(d=st.integers(1, 50), data=st.data())
def test_parameter_counts(d: int, data: st.DataObject) -> None:
    r = data.draw(st.integers(1, d))
    count = {
        "loreft": 2 * r * d + r,
        "noreft": 2 * r * d + r,
        "direft": 2 * r * d + r,
        "nodireft": 2 * r * d + r,
        "consreft": r * d + r,
        "lobireft": r * d + r,
        "red": 2 * d,
        "reft_r1": d,
        "postblock": 2 * r * d,
    }
    for kind in KINDS:
        assert sum(p.numel() for p in build(kind, d, r).parameters()) == count[kind], kind


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    kind=st.sampled_from(["loreft", "direft", "consreft", "lobireft"]),
    d=st.integers(2, 24),
    seed=st.integers(0, 99),
    data=st.data(),
)
def test_what_is_orthogonal_to_the_rows_of_r_is_untouched(kind: str, d: int, seed: int, data: st.DataObject) -> None:
    module = randomised(kind, d, data.draw(st.integers(1, d)), seed, init_weights=False)
    h = torch.randn(6, d, dtype=torch.float64)
    rows = module.R.detach()
    away = torch.eye(d, dtype=torch.float64) - torch.linalg.pinv(rows) @ rows
    torch.testing.assert_close(
        (module(h) - h).detach() @ away, torch.zeros(6, d, dtype=torch.float64), atol=1e-6, rtol=0
    )


@pytest.mark.parametrize("kind", KINDS)
def test_any_leading_shape_and_no_token_at_all(kind: str) -> None:
    module = randomised(kind, init_weights=False).float()
    h = torch.randn(2, 3, 12)
    assert module(h).shape == (2, 3, 12)
    if kind != "reft_r1":  # whose tokens depend on one another
        torch.testing.assert_close(module(h)[1, 2], module(h[1, 2]))
        torch.testing.assert_close(module(h)[0], module(h[0]))
    assert module(h[0, 0]).shape == (12,)
    assert module(h[:0]).shape == (0, 3, 12)
    assert module(h[:, :0]).shape == (2, 0, 12)


@pytest.mark.parametrize("kind", KINDS)
def test_rows_handed_over_as_a_list_are_edited_alike(kind: str) -> None:
    module = randomised(kind, init_weights=False)
    h = torch.randn(9, 12, dtype=torch.float64)
    torch.testing.assert_close(module(h, torch.zeros(9, dtype=torch.long)), module(h))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_computed_in_fp32_or_wider_and_returned_in_the_dtype_of_h(kind: str, dtype: torch.dtype) -> None:
    module = randomised(kind, init_weights=False).float()
    h = torch.randn(4, 12).to(dtype)
    exact = module(h.float()).to(dtype)
    torch.testing.assert_close(module(h), exact, atol=1e-5 if dtype == torch.float64 else 0, rtol=0)
    assert module(h).dtype == dtype


@pytest.mark.parametrize("kind", KINDS)
def test_autocast_changes_nothing(kind: str) -> None:
    module = randomised(kind, init_weights=False).float()
    h = torch.randn(4, 12)
    outside = module(h)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = module.train()(h)
    assert torch.equal(inside, outside)


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_are_those_of_the_formula(kind: str) -> None:
    """Of h and all parameters but R, whose gradient has tests of its own."""
    module = randomised(kind, 6, 2, init_weights=False)
    h = torch.randn(3, 6, dtype=torch.float64, requires_grad=True)
    free = [p for n, p in module.named_parameters() if n != "R" or not module.orthonormal]
    if isinstance(module, LowRankIntervention) and module.orthonormal:
        module.R.requires_grad_(False)
    assert torch.autograd.gradcheck(lambda *_: module(h), (h, *free))


def test_every_kind_is_tested_here() -> None:
    ours = {kind for kind, cls in INTERVENTIONS.items() if cls.__module__.startswith("reftune.")}
    assert ours == set(KINDS)
    assert all(issubclass(cls, nn.Module) for cls in INTERVENTIONS.values())
